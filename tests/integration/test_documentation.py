"""The blocks of README and docs are run in order, as a newcomer would, with a folder of small drawn photos."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml
from commands import ROOT
from pages import NOT_RUN
from PIL import Image

from multigrain.config.data import DataSettings
from multigrain.data.builtin import write_builtin
from multigrain.hooks import no_progress

MY = {
    "name": "my",
    "data": {"folder": "photos"},
    "base": {"image_size": 32, "epochs": 1, "model": {"trunk": "narrow"}, "batch": {"size": 24}},
    "space": {"model.p": {"uniform": [1.0, 5.0]}},
    "objective": {"top1": "max"},
    "search": {"trials": 1},
    "winner": {"candidates": 1, "seeds": 1},
}
SMALLER = {
    "image_size: 128": "image_size: 32",
    "epochs: 5": "epochs: 1",
    "trunk: resnet18, weights: zoo": "trunk: narrow",
    "batch: {size: 96}": "batch: {size: 24}",
    "base.epochs=30": "base.epochs=2",
    '"base.epochs": 3': '"base.epochs": 2',
    "[224,500]": "[32,48]",
    "[24,32,48]": "[24,32]",
    "[1,2,3,5]": "[1,3]",
}
"""What makes an example small enough for a test."""
HERE = {
    "models:/demo@": "models:/my@",
    "models:/products@": "models:/my@",
    "rollback products": "rollback my",
    "/data/copydays": "drawn/copies",
    "grainmill-runs/data/digits": "drawn",
    "on copydays=copies": "on copydays=drawn/copies",
}
"""Names of a reader's own models and folders, and those of the test."""
ELSEWHERE = {
    ". .venv/bin/activate": "the tests run in their own environment",
    "grainmill submit": NOT_RUN["cluster"],
    "--address auto": NOT_RUN["cluster"],
    "s3://": NOT_RUN["cluster"],
}
"""Lines that are not run, and why."""
REFUSED = ("grainmill promote", "grainmill rollback")
"""Commands that may refuse with code 1: which of two tiny networks is better is chance."""
PAGES = [
    *("docs/search.md", "README.md", "docs/evaluation.md", "docs/models.md", "docs/corpus.md"),
    *("docs/clusters.md", "docs/python.md", "infra/README.md"),
]
"""In this order, each page finds the runs and models that it names."""


def adapted(text):
    for old, new in {**SMALLER, **HERE}.items():
        text = text.replace(old, new)
    return text


class Newcomer:
    """A reader with an empty folder, photos, and the repository's folders beside them; runs each command once."""

    def __init__(self, folder):
        self.folder, self.done = folder, set()
        drawn = write_builtin(
            DataSettings(builtin="shapes", images=200, image_size=32), folder / "builtin", no_progress
        )
        for name in ("infra", "search_spaces"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "drawn").symlink_to(drawn)
        for number, path in enumerate(sorted([*drawn.glob("train/*/*.png"), *drawn.glob("val/*/*.png")])):
            target = folder / "photos" / path.parent.name / f"{number}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(target)
        for name in ("query.jpg", "photo.jpg"):
            (folder / name).write_bytes(target.read_bytes())
        (folder / "my.yaml").write_text(yaml.safe_dump(MY))
        scripts = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def run(self, block):
        text = adapted(block.text)
        if block.language == "yaml":
            if name := re.search(r"^name: (\w+)", text):
                (self.folder / f"{name[1]}.yaml").write_text(text)
        elif block.language == "python":
            self._call([sys.executable, "-c", text])
        else:
            lines = [line for line in block._replace(text=text).commands if not self._elsewhere(line)]
            self.done |= {*lines}
            script = [f"{line} || [ $? = 1 ]" if line.startswith(REFUSED) else line for line in lines]
            self._call(["bash", "-euo", "pipefail", "-c", "\n".join(script)])

    def _elsewhere(self, line):
        return (line in self.done and not line.startswith("export ")) or any(part in line for part in ELSEWHERE)

    def _call(self, command):
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    return Newcomer(tmp_path_factory.mktemp("newcomer"))


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, newcomer):
    for block in pages.blocks(ROOT / page, "sh", "python", "yaml"):
        if not set(block.marks) & {*NOT_RUN}:
            newcomer.run(block)


def test_the_readmes_way_ends_with_a_page_of_duplicates(newcomer):
    """After the blocks of README.md: the files that it names are there."""
    for name in (
        "photos.index.reports/duplicates.csv",
        "photos.index.reports/duplicates.html",
        "grainmill-runs/my/run-1/report.html",
    ):
        assert (newcomer.folder / name).exists()


def test_every_page_with_blocks_that_can_run_is_run():
    for page in pages.PAGES:
        found = [block for block in pages.blocks(page, "sh", "python") if not set(block.marks) & {*NOT_RUN}]
        assert not found or str(page.relative_to(ROOT)) in PAGES
