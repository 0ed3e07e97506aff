"""The paper's figures beside one's own: which rows are shown, and which one counts as the same experiment."""

from dataclasses import dataclass, field
from itertools import product

import pytest

from multigrain.benchmarks.published import PUBLISHED, difference, paper, rows
from multigrain.config.training import MultiGrainSpec


@dataclass
class Bench:
    """A benchmark, as far as it matters which figure is shown."""

    name: str
    count: int = 0
    as_published: bool = True
    database: range = field(init=False)

    def __post_init__(self):
        self.database = range(self.count)


def shown(name, part, measure, size, weight=0.5, p=3.0, database=0, as_published=True, trunk="resnet50"):
    spec = MultiGrainSpec.model_validate({"loss": {"weight": weight}, "model": {"p": p, "trunk": trunk}})
    return paper(Bench(name, database, as_published), part, measure, size, spec)


def test_the_papers_figure_is_shown_for_the_same_network_size_and_set():
    # Tables D.1 and 2 of arXiv:1902.05509.
    assert shown("holidays", "", "map", 500) == 0.915
    assert shown("holidays", "", "map", 500, weight=1.0) == 0.918
    assert shown("ukbench", "", "ukb", 800) == 3.91
    assert shown("imagenet", "", "top1", 500) == 0.786
    assert shown("imagenet", "", "top5", 500, p=1.0) == 0.935
    assert shown("copydays", "strong", "map", 224, database=10_157) == 0.741


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        (("holidays", "", "map", 501), {}),
        (("holidays", "", "map", 500), {"weight": 0.4}),
        (("holidays", "", "map", 500), {"p": 1.0}),
        (("holidays", "", "map", 500), {"as_published": False}),
        (("holidays", "", "map", 500), {"trunk": "resnet18"}),
        (("holidays", "", "map", 500), {"trunk": "narrow"}),
        (("imagenet", "", "top1", 500), {"trunk": "resnet101"}),
        (("holidays-upright", "", "map", 500), {}),
        (("imagenet", "", "top1", 224), {"as_published": False}),
        (("copydays", "strong", "map", 224), {"database": 157}),
        (("copydays", "strong", "map", 224), {"database": 10_156}),
        (("copydays", "crops/10", "map", 224), {"database": 10_157}),
        (("copydays", "strong", "micro_ap", 224), {"database": 10_157}),
    ],
)
def test_it_is_not_shown_for_another(asked, settings):
    assert shown(*asked, **settings) is None


def test_rows_are_those_of_all_networks_and_sizes():
    # Six networks of Table D.1, at three sizes.
    found = rows(Bench("holidays", as_published=False), "", "map")
    networks = {
        *(("PyTorch zoo", None, 1), ("ResNet-50", None, 1), ("ResNet-50", None, 3)),
        *(("MultiGrain", 1, 3), ("MultiGrain", 0.5, 3), ("MultiGrain + AutoAugment", 0.5, 3)),
    }
    assert {(row.method, row.weight, row.p, row.size) for row in found} == {
        (*network, size) for network, size in product(networks, (224, 500, 800))
    }
    assert len(found) == 18
    assert {(row.benchmark, row.setting, row.measure) for row in found} == {("holidays", "", "map")}
    assert rows(Bench("copydays"), "crops/10", "map") == rows(Bench("paris6k"), "", "map") == []
    assert {row.method for row in PUBLISHED} > {"MultiGrain"}


def test_what_differs_is_told():
    (holidays, *_), (copydays, *_) = rows(Bench("holidays"), "", "map"), rows(Bench("copydays"), "strong", "map")
    assert difference(Bench("holidays", 1491), holidays) == ""
    assert difference(Bench("holidays", 1491, as_published=False), holidays) == "the set here is not the published one"
    assert difference(Bench("copydays", 10_157), copydays) == ""
    assert difference(Bench("copydays", 162), copydays) == "they are with 10,000 distractors, and here are 5"
