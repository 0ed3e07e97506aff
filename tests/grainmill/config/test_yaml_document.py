import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grainmill.config.yaml_document import MAX_BYTES, Document, dotted, to_yaml
from grainmill.errors import ExperimentError, Problem

TEXT = """\
# a comment
name: small

base:
  epochs: 3
  loss:
    weight: 1e-4   # lambda
  batch: {size: 96,
          repeats: 3}
space:
  loss.weight: {choice: [0.5,
                         1.0]}
"""


@pytest.fixture
def read(tmp_path):
    """A `Document` of a text or of bytes."""

    def read(content):
        file = tmp_path / "file.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Document(file)

    return read


def test_a_file_becomes_plain_data(read):
    document = read(TEXT)
    assert document.problems == []
    assert document.tree == {
        "name": "small",
        "base": {"epochs": 3, "loss": {"weight": 0.0001}, "batch": {"size": 96, "repeats": 3}},
        "space": {"loss.weight": {"choice": [0.5, 1.0]}},
    }


def test_every_key_and_item_has_its_line(read):
    document = read(TEXT)
    expected = {
        ("name",): 2,
        ("base",): 4,
        ("base", "epochs"): 5,
        ("base", "loss"): 6,
        ("base", "loss", "weight"): 7,
        ("base", "batch"): 8,
        ("base", "batch", "size"): 8,
        ("base", "batch", "repeats"): 9,
        ("space",): 10,
        ("space", "loss.weight"): 11,
        ("space", "loss.weight", "choice"): 11,
        ("space", "loss.weight", "choice", 0): 11,
        ("space", "loss.weight", "choice", 1): 12,
    }
    assert {place: document.lines.get(place) for place in expected} == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_whatever_ends_them(read, newline):
    assert read(newline.join(["a: 1", "", "b: 2", ""])).lines["b",] == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),
        ("1E5", 100000.0),
        ("+1e2", 100.0),
        ("-2.5e-3", -0.0025),
        ("3.e1", 30.0),
        ("0.5", 0.5),
        ("12", 12),
        ("-7", -7),
        ("true", True),
        ("full", "full"),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1e-4x", "1e-4x"),
    ],
)
def test_a_plain_value_is_read_as_people_mean_it(read, text, value):
    document = read(f"key: {text}\n")
    document.override(f"other.key={text}", {})
    for found in (document.tree["key"], document.tree["other"]["key"]):
        assert found == value
        assert type(found) is type(value)


def test_every_word_that_yaml_reads_otherwise_than_people_is_told_at_its_line(read):
    document = read("a: [0.1, yes]\nb:\n  no: 08\n  d: OFF\n  e: '010'\nf: 2024-01-15 10:00:00\ng: 0\nh: -1:30\n")
    assert [(problem.line, problem.key) for problem in document.problems] == [
        (1, "a.1"),
        (4, "b.d"),
        (6, "f"),
        (8, "h"),
    ]
    assert document.tree["b"] == {"no": "08", "d": "OFF", "e": "010"}


@pytest.mark.parametrize("text", ["!!python/name:os.system x: 1", "!mine x: 1"])
def test_a_key_with_a_tag_is_refused(read, text):
    (problem,) = read(text + "\n").problems
    assert "could not determine a constructor" in problem.message


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("a1e: #-[{'\"\n", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), PLAIN, min_size=1, max_size=3))
@example({"a": "1e3"})  # text, which 1e3 without quotes would not be
def test_what_is_written_is_read_again(tmp_path_factory, tree):
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    file.write_text(to_yaml(tree))
    document = Document(file)
    assert document.problems == []
    assert document.tree == tree
    assert list(document.tree) == list(tree)


def test_a_file_that_does_not_parse_has_one_problem_with_its_line(read):
    document = read("name: small\nbase: {epochs: 3\nsearch: 1\n")
    assert [(problem.line, problem.key) for problem in document.problems] == [(3, "")]
    assert document.tree == {}


def test_a_file_may_be_as_large_as_the_limit_but_not_larger(read):
    head = b"name: small\n#"
    assert read(head + b"x" * (MAX_BYTES - len(head))).problems == []
    too_large = read(head + b"x" * (MAX_BYTES - len(head) + 1))
    assert str(MAX_BYTES + 1) in too_large.problems[0].message
    assert too_large.tree == {}


def test_a_mark_of_utf_8_at_the_start_is_no_part_of_the_first_key(read):
    assert read(b"\xef\xbb\xbfname: small\n").tree == {"name": "small"}


@pytest.mark.parametrize(
    ("override", "tree"),
    [
        ("name=other", {"name": "other", "base": {"epochs": 3, "loss": {"weight": 0.5}}}),
        ("base.epochs=4", {"name": "small", "base": {"epochs": 4, "loss": {"weight": 0.5}}}),
        ("base.loss.weight=1e-1", {"name": "small", "base": {"epochs": 3, "loss": {"weight": 0.1}}}),
        ("base.loss={beta: 2}", {"name": "small", "base": {"epochs": 3, "loss": {"beta": 2}}}),
        (
            "resources.workers=2",
            {"name": "small", "base": {"epochs": 3, "loss": {"weight": 0.5}}, "resources": {"workers": 2}},
        ),
        (
            "base.optimizer.rate=2",
            {"name": "small", "base": {"epochs": 3, "loss": {"weight": 0.5}, "optimizer": {"rate": 2}}},
        ),
        # The name of a searched parameter holds dots itself.
        (
            "space.loss.weight={uniform: [0.2, 0.8]}",
            {
                "name": "small",
                "base": {"epochs": 3, "loss": {"weight": 0.5}},
                "space": {"loss.weight": {"uniform": [0.2, 0.8]}},
            },
        ),
        (
            "space={loss.weight: {uniform: [0.2, 0.8]}}",
            {
                "name": "small",
                "base": {"epochs": 3, "loss": {"weight": 0.5}},
                "space": {"loss.weight": {"uniform": [0.2, 0.8]}},
            },
        ),
        # Only the first equals sign parts key and value.
        ("name=a=b", {"name": "a=b", "base": {"epochs": 3, "loss": {"weight": 0.5}}}),
    ],
)
def test_an_override_changes_its_key_and_no_other(read, override, tree):
    document = read("name: small\nbase:\n  epochs: 3\n  loss: {weight: 0.5}\n")
    document.override(override, {})
    assert document.problems == []
    assert document.tree == tree


def test_the_last_of_two_overrides_counts(read):
    document = read("name: small\n")
    document.override("name=first", {})
    document.override("name=second", {})
    assert document.tree == {"name": "second"}


def test_an_overridden_key_has_no_line_and_neither_has_anything_in_it(read):
    document = read("name: small\nbase:\n  epochs: 3\n  loss:\n    weight: 0.5\n  seed: 1\n")
    document.override("base.loss={weight: 7}", {})
    document.override("base.image_size=7", {})
    for place in [("base", "loss", "weight"), ("base", "image_size"), ("base", "seed"), ("base", "epochs", "x")]:
        document.add(place, "wrong")
    assert [(problem.line, problem.key) for problem in document.problems] == [
        (None, "base.loss.weight"),
        (None, "base.image_size"),
        (6, "base.seed"),
        (3, "base.epochs.x"),
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("base.epochs", ["key=value", "'base.epochs'"]),
        ("", ["key=value", "''"]),
        ("=3", ["key=value", "'=3'"]),
        ("base.epochs=[1", ["base.epochs", "valid YAML"]),
        ("base.epochs=*a", ["base.epochs", "aliases are not supported"]),
        ("base.epochs=!!python/name:os.system x", ["base.epochs", "python/name:os.system"]),
        ("base.epochs=!!python/object/apply:os.getcwd []", ["base.epochs", "python/object/apply:os.getcwd"]),
        ("name.x=3", ["name", "is a value, not a section"]),
        ("base.epochs={a: 1, a: 2}", ["base.epochs", "once"]),
        ("base.epochs=2020-13-45", ["base.epochs", "2020-13-45"]),
        ("base.epochs=" + "[" * 1000, ["base.epochs", "nested"]),
    ],
)
def test_an_override_that_makes_no_sense_is_a_problem_and_changes_nothing(read, override, says):
    document = read("name: small\n")
    document.override(override, {})
    (problem,) = document.problems
    assert problem.line is None
    assert [part for part in ["--set", *says] if part not in str(problem)] == []
    assert document.tree == {"name": "small"}


def test_problems_are_sorted_by_line_and_key_and_told_once():
    problems = [Problem(9, "b", "z"), Problem(None, "c", "y"), Problem(2, "d", "x"), Problem(9, "a", "w")]
    # Many of one key, as images are: a set would shuffle them.
    many = [Problem(5, "data", f"image {number}") for number in range(50)]
    error = ExperimentError("file.yaml", [*problems, *many, problems[0]])
    assert error.problems == [problems[1], problems[2], *many, problems[3], problems[0]]
    head, *lines = str(error).splitlines()
    assert head == "file.yaml: 54 problems"
    assert lines[:3] == ["  c: y", "  line 2: d: x", "  line 5: data: image 0"]


def test_stop_raises_all_problems_or_nothing(read):
    document = read("name: small\n")
    document.stop_if_wrong()
    document.add(("name",), "must be other")
    with pytest.raises(ExperimentError) as caught:
        document.stop_if_wrong()
    assert caught.value.problems == [Problem(1, "name", "must be other")]
    assert str(caught.value).splitlines() == [f"{document.file}: 1 problem", "  line 1: name: must be other"]


def test_a_location_is_dotted():
    assert dotted(("space", "loss.weight", "choice", 0)) == "space.loss.weight.choice.0"
