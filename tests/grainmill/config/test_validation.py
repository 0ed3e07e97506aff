"""Messages about values that pydantic refuses."""

from typing import Annotated

import pytest
from pydantic import BaseModel, Field, ValidationError

from grainmill.config.validation import error_messages

Size = Annotated[int, Field(ge=16)]


class Grid(BaseModel):
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)] | None = None
    pair: Annotated[tuple[Size, ...], Field(min_length=2)] = (16, 16)
    deep: dict[str, Annotated[tuple[tuple[Size, ...], ...], Field(min_length=1)]] = {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"sizes": [8]}, {"sizes.0": "must be greater than or equal to 16, got 8"}),
        (
            {"sizes": [8, "x"]},
            {
                "sizes.0": "must be greater than or equal to 16, got 8",
                "sizes.1": "must be a valid integer, unable to parse string as an integer, got 'x'",
            },
        ),
        ({"sizes": [8, 16]}, {"sizes.0": "must be greater than or equal to 16, got 8"}),
        ({"sizes": []}, {"sizes": "must have at least 1 items, got []"}),
        ({"pair": [8, 16]}, {"pair.0": "must be greater than or equal to 16, got 8"}),
        (
            {"pair": [8]},
            {"pair.0": "must be greater than or equal to 16, got 8", "pair": "must have at least 2 items, got [8]"},
        ),
        (
            {"sizes": [8], "pair": [16]},
            {"sizes.0": "must be greater than or equal to 16, got 8", "pair": "must have at least 2 items, got [16]"},
        ),
        ({"deep": {"a": [[8]]}}, {"deep.a.0.0": "must be greater than or equal to 16, got 8"}),
        (
            {"deep": {"a": [], "b": [[8]]}},
            {
                "deep.a": "must have at least 1 items, got []",
                "deep.b.0.0": "must be greater than or equal to 16, got 8",
            },
        ),
    ],
)
def test_a_list_is_too_short_only_if_it_is_with_its_wrong_items(content, told):
    with pytest.raises(ValidationError) as caught:
        Grid.model_validate(content)
    found = [(".".join(map(str, place)), message) for place, message in error_messages(Grid, caught.value)]
    assert dict(found) == told
    assert len(found) == len(told)
