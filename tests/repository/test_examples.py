"""The example that needs neither Ray nor a server; the others are run in `tests/integration`."""

import re

from commands import ROOT, python


def test_the_loop_of_ones_own_learns_classes_and_descriptors():
    lines = python("examples/own_loop.py").splitlines()
    values = [[float(value) for value in re.findall(r"(?:loss|top1|digit) ([\d.]+)", line)] for line in lines]
    assert len(values) == 3
    (first_loss, first_top1, first_map), (loss, top1, retrieval) = values[0], values[-1]
    assert loss < first_loss
    assert top1 > max(0.4, first_top1)  # ten classes: chance is 0.1
    assert retrieval > max(0.6, first_map)


def test_the_page_names_every_example():
    page = (ROOT / "examples" / "README.md").read_text()
    names = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in {".py", ".yaml"}]
    assert [name for name in names if f"]({name})" not in page] == []
