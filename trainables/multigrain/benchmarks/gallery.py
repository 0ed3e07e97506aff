"""Pictures about an evaluation: a page of queries with what was found, and the grid as a heat map."""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from multigrain.benchmarks.base import Benchmark
from multigrain.benchmarks.figures import ResultGrid
from multigrain.data.loading import read
from multigrain.data.picture import Picture
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import average_precision

BEST, WORST, FOUND = 5, 10, 8
"""Queries of each kind on a page, and results of each."""
PANELS = 4
"""Panels of a heat map side by side."""
SIDE = 120
"""Pixels of a thumbnail."""

_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:1300px}
.row{display:flex;gap:6px;align-items:flex-start;margin:10px 0}
figure{margin:0;width:128px;font-size:11px;overflow-wrap:anywhere}
img{border:4px solid #888;box-sizing:border-box;max-width:128px}
.right img{border-color:#2a9d4a}.wrong img{border-color:#d1495b}.query{margin-right:18px}"""


def page(
    path: Path,
    benchmark: Benchmark,
    part: str,
    queries: NDArray[np.float32],
    database: NDArray[np.float32],
    ranks: Sequence[NDArray[np.int64]],
) -> None:
    """Write one HTML page: the best and the worst queries by average precision, with the first items found.

    Right items have a green frame, wrong ones a red one; junk is left out.

    Args:
        path: of the page.
        part: a key of `benchmark.truth`.
        queries, database: descriptors, (Q, C) and (D, C).
        ranks: of each query's positives, as `search.ranks` gives them.
    """
    precision = {query: average_precision(one) for query, one in enumerate(ranks) if len(one)}
    order = sorted(precision, key=precision.__getitem__)
    worst, best = order[:WORST], order[::-1][:BEST]
    junk = max((len(one.junk) for one in benchmark.truth[part]), default=0)
    shown = [*best, *worst]
    nearest, _ = ranking.top(queries[shown], database, min(len(database), FOUND + junk))
    rows = {
        query: _row(benchmark, part, query, precision[query], found)
        for query, found in zip(shown, nearest, strict=True)
    }
    title = html.escape(f"{benchmark.name} {part}".strip())
    sections = "".join(
        f"<h2>{heading}</h2>{''.join(rows[query] for query in some)}"
        for heading, some in (("Best queries", best), ("Worst queries", worst))
    )
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>The query, then what was found, nearest first: green is right, red wrong.</p>{sections}",
        encoding="utf-8",
        errors="replace",  # names of files are bytes, not always text
    )


def _row(benchmark: Benchmark, part: str, query: int, precision: float, found: NDArray[np.int64]) -> str:
    truth = benchmark.truth[part][query]
    positives, junk = set(truth.positives.tolist()), set(truth.junk.tolist())
    kept = [item for item in found.tolist() if item not in junk][:FOUND]
    cells = [_thumbnail(benchmark.queries[query], "query", f"AP {precision:.3f}")]
    cells += [_thumbnail(benchmark.database[item], "right" if item in positives else "wrong", "") for item in kept]
    return f"<div class=row>{''.join(cells)}</div>"


def _thumbnail(picture: Picture, kind: str, note: str) -> str:
    image = Image.fromarray(read(picture).permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    source = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(f"{picture.path.name} {note}".strip())
    shown = f'<img src="data:image/jpeg;base64,{source}" alt="">'
    return f"<figure class={kind}>{shown}<figcaption>{caption}</figcaption></figure>"


def heat_map(path: Path, grids: Sequence[ResultGrid]) -> Path:
    """Write a picture of grids, a panel for each."""
    from matplotlib.figure import Figure as Canvas

    across = min(len(grids), PANELS)
    down = math.ceil(len(grids) / across)
    canvas = Canvas(figsize=(4 * across, 3 * down), layout="constrained")
    places = canvas.subplots(down, across, squeeze=False).flat
    for axes in places[len(grids) :]:
        axes.remove()
    for axes, grid in zip(places, grids, strict=False):
        values = np.array([*grid.rows.values()])
        axes.imshow(values, aspect="auto", cmap="Greens")
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(grid.columns)), grid.columns)
        axes.set_yticks(range(len(grid.rows)), grid.rows)
        axes.set_xlabel(grid.across)
        axes.set_ylabel(grid.down)
        axes.set_title(grid.title, fontsize=9)
    canvas.savefig(path, dpi=100)
    return path
