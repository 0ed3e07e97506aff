"""The base of all sections of an experiment file."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the experiment file: frozen, unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
