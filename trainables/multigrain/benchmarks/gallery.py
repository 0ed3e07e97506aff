"""Pictures of an evaluation: a page of queries with the images found, and a heat map of the grid."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image

from multigrain.benchmarks.results import ResultGrid
from multigrain.data.loading import read
from multigrain.data.picture import Picture
from multigrain.evaluation.measure import Retrieval
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import Truth, average_precision

BEST, WORST, FOUND = 5, 10, 8
"""Number of the best queries on a page, of the worst queries, and of the images found for each."""
PANELS = 4
"""Panels of a heat map side by side."""
SIDE = 120
"""Longer side of a thumbnail, in pixels."""


def page(path: Path, found: Retrieval, title: str) -> None:
    """Write an HTML page with the best and the worst queries by average precision, and the first images found.

    Right images have a green frame, wrong ones a red one; junk is left out.
    """
    (truths,) = found.benchmark.truth.values()
    precision = {query: average_precision(ranks) for query, ranks in enumerate(found.ranks) if len(ranks)}
    order = sorted(precision, key=precision.__getitem__)
    worst, best = order[:WORST], order[::-1][:BEST]
    junk = max((len(truth.junk) for truth in truths), default=0)
    shown = [*best, *worst]
    nearest, _ = ranking.top(found.queries[shown], found.database, min(len(found.database), FOUND + junk))
    rows = {}
    for query, items in zip(shown, nearest, strict=True):
        asked = found.benchmark.queries[query]
        first = ("query", _thumbnail(asked), f"{asked.path.name} AP {precision[query]:.3f}")
        rows[query] = [first, *_items(found.benchmark.database, truths[query], items)]
    sections = {"Best queries": best, "Worst queries": worst}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("gallery.html").render(
        title=title, sections=[(heading, [rows[query] for query in some]) for heading, some in sections.items()]
    )
    path.write_text(text, encoding="utf-8", errors="replace")  # names of files are bytes, not always text


def _items(database: Sequence[Picture], truth: Truth, nearest: NDArray[np.int64]) -> list[tuple[str, str, str]]:
    """Return kind, thumbnail and caption of the first items that are no junk."""
    positives, junk = set(truth.positives.tolist()), set(truth.junk.tolist())
    shown = [item for item in nearest.tolist() if item not in junk][:FOUND]
    return [
        ("right" if item in positives else "wrong", _thumbnail(database[item]), database[item].path.name)
        for item in shown
    ]


def _thumbnail(picture: Picture) -> str:
    """Return a small JPEG of a picture in base64."""
    image = Image.fromarray(read(picture).permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def heat_map(path: Path, grids: Sequence[ResultGrid]) -> Path:
    """Write a PNG image of grids, one panel for each."""
    from matplotlib.figure import Figure

    across = min(len(grids), PANELS)
    down = math.ceil(len(grids) / across)
    canvas = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    places = canvas.subplots(down, across, squeeze=False).flat
    for axes in places[len(grids) :]:
        axes.remove()
    for axes, grid in zip(places, grids, strict=False):
        values = np.array(grid.values)
        axes.imshow(values, aspect="auto", cmap="Greens")
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(grid.exponents)), [f"{p:.3g}" for p in grid.exponents])
        axes.set_yticks(range(len(grid.sizes)), grid.sizes)
        axes.set(xlabel="p*", ylabel="s*, pixels")
        axes.set_title(grid.title, fontsize=9)
    canvas.savefig(path, dpi=100)
    return path
