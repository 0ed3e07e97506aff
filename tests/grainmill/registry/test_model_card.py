"""Model cards: their tags, JSON and Markdown, without passwords."""

import json

import toy

from grainmill.registry import model_card
from grainmill.registry.model_card import Interval, ModelCard

SECRET = "hunter2"
CARD = ModelCard(
    "toy",
    f"name: apples\ntracking: {{uri: 'https://me:{SECRET}@host/x'}}\n",
    {"search": "file:///runs/apples/run-1", "trial": "trial-0003", "seed": "7"},
    toy.sources(toy.Data()),
    {"python": "3.11.7", "git.dirty": "true"},
    {"cpu": "2 x abacus"},
    {"cpu_seconds": 61.7},
    {"score": Interval(0.5, 0.25, 0.75), "cost": Interval(4.0)},
)
FACTS = {"p": 3.0, "classes": [f"c{number}" for number in range(12)], "parity": {"torch": 0.0, "onnx": 1.19e-7}}


def test_tags_find_a_version_by_anything_it_came_from():
    assert CARD.tags() == {
        "search": "file:///runs/apples/run-1",
        "trial": "trial-0003",
        "seed": "7",
        "python": "3.11.7",
        "git.dirty": "true",
        "hardware.cpu": "2 x abacus",
        "data.heights": "a1b2",
        "data.scale": "c3d4",
        "cost.cpu_seconds": "62",
    }


def test_the_file_has_all_of_it():
    told = json.loads(CARD.json())
    assert told["data"][1] == {"name": "scale", "role": "evaluation", "digest": "c3d4", "rows": 1, "where": "nowhere"}
    assert told["metrics"] == {"score": [0.5, 0.25, 0.75], "cost": [4.0, None, None]}
    assert told["experiment"].startswith("name: apples\n")
    assert SECRET not in CARD.json()


def test_the_card_tells_model_figures_data_training_software_and_settings():
    card = CARD.markdown("apples", FACTS)
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        "# apples",
        "## Metrics, with 95 % intervals of the mean over trainings",
        "## Data",
        "## Training",
        "## Software",
        "## Settings",
    ]
    for row in (
        "| trainable | toy |",
        "| p | 3 |",
        "| classes | 12: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, ... |",
        "| parity | torch 0, onnx 1.19e-07 |",
        "| score | 0.5000 [0.2500, 0.7500] |",
        "| cost | 4.0000 |",
        "| scale | 1 rows for evaluation, digest c3d4, nowhere |",
        "| seed | 7 |",
        "| cpu_seconds | 62 |",
        "| cpu | 2 x abacus |",
        "| git.dirty | true |",
    ):
        assert row in card.splitlines()
    assert "```yaml\nname: apples\n" in card
    assert SECRET not in card


def test_a_card_cannot_be_broken_by_what_it_tells():
    card = CARD.markdown("apples", {"trunk": "a|b\nc"})
    assert "| trunk | a\\|b c |" in card.splitlines()


def test_an_evaluated_models_card_keeps_where_the_other_came_from():
    source = CARD.markdown("apples", FACTS)
    figures = {"scale/map": Interval(0.9, 0.8, 1.0)}
    card = model_card.evaluated_markdown(source, "models:/apples/1", "500/p4", {"p": 4.0}, figures)
    head, kept = card.split("## Metrics")
    assert kept == source.split("## Metrics")[1]
    rows = head.splitlines()
    for row in ("# apples", "| made of | models:/apples/1 |", "| serves | 500/p4 |", "| p | 4 |"):
        assert row in rows
    assert "| scale/map | 0.9000 [0.8000, 1.0000] |" in rows
    assert "| p | 3 |" not in rows


def test_a_description_holds_the_sections_that_fit():
    card = "# a\n\n| x | y |\n\n## One\n\n1\n\n## Two\n\n" + 5000 * "2" + "\n\n## Three\n"
    told = model_card.description(card, "about/card.md")
    assert told == "# a\n\n| x | y |\n\n## One\n\n1\n\nThe whole card is the artifact `about/card.md`."
    long = model_card.description("# " + 9000 * "x", "about/card.md")
    assert len(long) <= model_card.LONGEST
    assert long.endswith("`about/card.md`.")
