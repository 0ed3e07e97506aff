"""What a gallery and a heat map show, read back from the page and from matplotlib's axes."""

import base64
import html
import io
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from multigrain.benchmarks.base import indices
from multigrain.benchmarks.gallery import BEST, FOUND, SIDE, WORST, heat_map, page
from multigrain.benchmarks.results import Measurement, grids
from multigrain.data.picture import Picture
from multigrain.evaluation.benchmark import Benchmark
from multigrain.evaluation.embed import Setting
from multigrain.evaluation.measure import Retrieval
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import Truth

CELL = re.compile(
    r'<figure class=(\w+)><img src="data:image/jpeg;base64,([^"]+)" alt=""><figcaption>(.*?)</figcaption>'
)


def pictures(folder, names, size=(40, 30)):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", size, (120, 120, 120)).save(folder / name, "PNG")
    return tuple(Picture(folder / name) for name in names)


def written(path, database, queries, truths, scores, part=""):
    """Headings and their rows of (kind, image, caption), of a page on items whose scores (Q, D) are given."""
    benchmark = Benchmark("set <1>", database, queries, {part: tuple(truths)}, ("map",))
    rows, items = np.array(scores, "f4"), np.eye(len(database), dtype="f4")
    page(path, Retrieval(benchmark, rows, items, ranking.ranks(rows, items, truths), {}), f"set <1> {part}".strip())
    content = path.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html><meta charset=utf-8>")
    found = {}
    for section in content.split("<h2>")[1:]:
        heading, body = section.split("</h2>")
        found[heading] = [CELL.findall(row) for row in body.split("<div class=row>")[1:]]
    return found, content


def truth(positives, junk=()):
    return Truth(indices(positives), indices(junk))


def shown(row):
    return [(kind, html.unescape(caption)) for kind, _, caption in row]


def test_right_and_wrong_are_marked_and_junk_is_left_out(tmp_path):
    database = pictures(tmp_path / "d", [f"{n}.png" for n in range(6)])
    queries = pictures(tmp_path / "q", ["a.png", "b.png"])
    truths = [truth([1, 4], [0, 5]), truth([2, 3], [3])]  # what is positive and junk is junk
    scores = [[0.9, 0.3, 0.5, 0.1, 0.8, 0.7], [0.1, 0.2, 0.6, 0.9, 0.4, 0.3]]
    found, content = written(tmp_path / "page.html", database, queries, truths, scores, "hard")
    # a: 4, 2, 1, 3, so that AP is (1 + 1)/2/2 + (1/2 + 2/3)/2/2 = 0.792; b: 2, 4, 5, 1, 0, AP 1.
    a = [("query", "a.png AP 0.792"), ("right", "4.png"), ("wrong", "2.png"), ("right", "1.png"), ("wrong", "3.png")]
    b = [("query", "b.png AP 1.000"), ("right", "2.png"), *(("wrong", f"{n}.png") for n in (4, 5, 1, 0))]
    assert [shown(row) for row in found["Best queries"]] == [b, a]
    assert [shown(row) for row in found["Worst queries"]] == [a, b]
    assert "<title>set &lt;1&gt; hard</title>" in content


def test_of_many_queries_the_best_and_the_worst_are_shown_in_order(tmp_path):
    count = 25
    database = pictures(tmp_path / "d", [f"{n:02}.png" for n in range(count)])
    queries = pictures(tmp_path / "q", [f"q{n:02}.png" for n in range(count)])
    # The list of every query is 0, 1, 2, ...: query n finds its positive at rank n; the last has none.
    truths = [*(truth([n]) for n in range(count - 1)), truth([])]
    scores = np.tile(np.linspace(1, 0.1, count), (count, 1))
    found, _ = written(tmp_path / "page.html", database, queries, truths, scores)
    first = {heading: [row[0][2].split()[0] for row in rows] for heading, rows in found.items()}
    assert first["Best queries"] == [f"q{n:02}.png" for n in range(BEST)]
    assert first["Worst queries"] == [f"q{count - 2 - n:02}.png" for n in range(WORST)]
    for rows in found.values():
        assert all([cell[2] for cell in row[1:]] == [f"{n:02}.png" for n in range(FOUND)] for row in rows)


def test_as_many_results_are_shown_whatever_the_junk_of_a_query(tmp_path):
    database = pictures(tmp_path / "d", [f"{n:02}.png" for n in range(20)])
    queries = pictures(tmp_path / "q", ["a.png", "b.png"])
    truths = [truth([19], range(10)), truth([0])]
    found, _ = written(tmp_path / "page.html", database, queries, truths, np.tile(np.linspace(1, 0.1, 20), (2, 1)))
    b, a = found["Best queries"]
    assert [cell[2] for cell in a[1:]] == [f"{n:02}.png" for n in range(10, 10 + FOUND)]
    assert [cell[2] for cell in b[1:]] == [f"{n:02}.png" for n in range(FOUND)]


def test_names_of_files_are_escaped(tmp_path):
    names = ["<b>&'\".png", "Ångström.png"]
    database, queries = pictures(tmp_path / "d", names), pictures(tmp_path / "q", ["<script>.png"])
    found, content = written(tmp_path / "page.html", database, queries, [truth([0])], [[0.9, 0.1]])
    assert shown(found["Best queries"][0]) == [
        ("query", "<script>.png AP 1.000"),
        ("right", names[0]),
        ("wrong", names[1]),
    ]
    assert "<script>" not in content
    assert "<b>" not in content


def test_a_name_that_is_no_text_does_not_stop_the_page(tmp_path):
    try:
        database = pictures(tmp_path / "d", ["\udcff.png"])
    except OSError:
        pytest.skip("the file system takes only text for names")
    found, _ = written(tmp_path / "page.html", database, database, [truth([0])], [[1.0]])
    assert shown(found["Best queries"][0]) == [("query", "?.png AP 1.000"), ("right", "?.png")]


def test_thumbnails_are_what_the_network_was_shown(tmp_path):
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[:100, :200], pixels[:100, 200:], pixels[100:, :200] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = tmp_path / "quarters.png"  # red, green; blue, black
    Image.fromarray(pixels).save(path)
    queries = (Picture(path, (200, 0, 400, 200), 0), Picture(path, None, 90), Picture(path, (0, 0, 200, 200), 270))
    database = (Picture(path), Picture(path, (-50, -9, 99.8, 50), 180), Picture(path, (380, 180, 400, 190), 0))
    truths = [truth([0]), truth([1]), truth([2])]
    found, _ = written(tmp_path / "page.html", database, queries, truths, [[1, 0.5, 0.2], [0.5, 1, 0.2], [0.2, 0.5, 1]])

    def decoded(cell):
        return Image.open(io.BytesIO(base64.b64decode(cell[1]))).convert("RGB")

    def corner(image, right, bottom):
        place = image.width * (3 if right else 1) // 4, image.height * (3 if bottom else 1) // 4
        return tuple(round(value / 255) for value in image.getpixel(place))

    def corners(image):
        return [corner(image, right, bottom) for bottom in (0, 1) for right in (0, 1)]

    red, green, blue, black = (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)
    rows = {row[1][1]: row for row in found["Best queries"]}
    assert len(rows) == 3
    images = [[decoded(cell) for cell in row] for row in found["Best queries"]]
    asked = {image.size: corners(image) for image, *_ in images}
    turned = [corners(image) for image, *_ in images if image.size == (SIDE, SIDE)]
    assert asked[SIDE // 2, SIDE] == [blue, red, black, green]  # a quarter clockwise
    assert sorted(turned) == sorted([[green, green, black, black], [red, blue, red, blue]])  # a crop; counter-clockwise
    items = {image.size: corners(image) for row in images for image in row[1:]}
    assert items == {(120, 60): [red, green, blue, black], (100, 50): [red] * 4, (20, 10): [black] * 4}


def grid_of(name, part, values, whitened=False, measure="map"):
    return [
        Measurement(name, part, measure, Setting(size, p, whitened), value, 0, 1) for (size, p), value in values.items()
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The canvases that are saved."""
    found = []
    save = Canvas.savefig
    monkeypatch.setattr(Canvas, "savefig", lambda self, *args, **more: found.append(self) or save(self, *args, **more))
    return found


def texts(axes):
    return {text.get_position()[::-1]: text.get_text() for text in axes.texts}


def test_a_panel_of_the_heat_map_is_a_part_of_a_benchmark_whitened_or_not(tmp_path, drawn):
    cells = [(500, 4.0), (500, 3.0), (224, 4.0), (224, 3.0), (500, math.inf), (224, math.inf)]
    values = dict(zip(cells, (0.11, 0.22, 0.33, 0.44, 0.55, 0.66), strict=True))
    other = {cell: value / 2 for cell, value in values.items()}
    figures = [
        *grid_of("roxford5k", "hard", values),
        *grid_of("roxford5k", "hard", dict.fromkeys(values, 0.999), measure="mp@1"),
        *grid_of("roxford5k", "easy", other),
        *grid_of("roxford5k", "hard", other, whitened=True),
        *grid_of("ukbench", "", values, measure="ukb"),
        *grid_of("imagenet", "", other, measure="top1"),
    ]
    assert heat_map(tmp_path / "grid.png", grids(figures)) == tmp_path / "grid.png"
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG"
    (canvas,) = drawn
    panels = {axes.get_title(): axes for axes in canvas.axes}
    assert set(panels) == {
        "roxford5k hard map", "roxford5k hard map, whitened", "roxford5k easy map", "ukbench ukb", "imagenet top1"
    }  # fmt: skip
    assert len(canvas.axes) == 5
    for title, expected in (("roxford5k hard map", values), ("roxford5k hard map, whitened", other)):
        axes = panels[title]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "4", "inf"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["224", "500"]
        table = [[expected[size, p] for p in (3.0, 4.0, math.inf)] for size in (224, 500)]
        np.testing.assert_array_equal(axes.images[0].get_array(), table)
        assert texts(axes) == {(row, column): f"{table[row][column]:.3f}" for row in (0, 1) for column in (0, 1, 2)}


def test_a_heat_map_of_one_panel(tmp_path, drawn):
    heat_map(tmp_path / "grid.png", grids(grid_of("holidays", "", {(224, 3.0): 0.5, (500, 3.0): 0.5})))
    (axes,) = drawn[0].axes
    assert texts(axes) == {(0, 0): "0.500", (1, 0): "0.500"}
    assert axes.get_title() == "holidays map"
