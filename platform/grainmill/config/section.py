"""Base class of the sections of an experiment file."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the experiment file: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
