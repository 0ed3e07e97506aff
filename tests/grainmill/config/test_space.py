import copy
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grainmill.config.space import Parameter, extremes, lookup, nested, resolve, shown, space_problems

quick = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def parameter(**fields):
    return Parameter.model_validate(fields)


CHAIN = {
    # Declared backwards: each depends on the one below.
    "leaf": parameter(uniform=[0.0, 1.0], when={"twig": [1, 2]}, otherwise=-1.0),
    "twig": parameter(int=[1, 3], when={"root": ["grow"]}, otherwise=0),
    "root": parameter(choice=["grow", "rest"]),
    "stone": parameter(loguniform=[0.1, 10.0]),
}


@pytest.mark.parametrize(
    ("offered", "asked", "setting"),
    [
        (
            {"leaf": 0.5, "twig": 2, "root": "grow", "stone": 1.0},
            ["leaf", "root", "stone", "twig"],
            {"leaf": 0.5, "twig": 2, "root": "grow", "stone": 1.0},
        ),
        (
            {"leaf": 0.5, "twig": 3, "root": "grow", "stone": 1.0},
            ["root", "stone", "twig"],
            {"leaf": -1.0, "twig": 3, "root": "grow", "stone": 1.0},
        ),
        # `twig` is 0 where it is not searched, and 0 is not among the values at which `leaf` is.
        (
            {"leaf": 0.5, "twig": 2, "root": "rest", "stone": 1.0},
            ["root", "stone"],
            {"leaf": -1.0, "twig": 0, "root": "rest", "stone": 1.0},
        ),
    ],
)
def test_only_active_parameters_are_drawn_and_the_others_take_their_otherwise(offered, asked, setting):
    drawn = []

    def draw(name, found):
        assert found is CHAIN[name]
        drawn.append(name)
        return offered[name]

    assert resolve(CHAIN, draw) == setting
    assert sorted(drawn) == asked


def test_a_parameter_is_drawn_after_those_it_depends_on():
    drawn = []
    resolve(CHAIN, lambda name, _: drawn.append(name) or {"leaf": 0.5, "twig": 2, "root": "grow", "stone": 1.0}[name])
    assert drawn.index("root") < drawn.index("twig") < drawn.index("leaf")


def test_a_parameter_with_two_conditions_is_searched_where_both_hold():
    space = {
        "a": parameter(choice=[1, 2]),
        "b": parameter(choice=["x", "y"]),
        "c": parameter(uniform=[0.0, 1.0], when={"a": [1], "b": ["x"]}, otherwise=9.0),
    }
    for a, b in product([1, 2], ["x", "y"]):
        expected = 0.25 if a == 1 and b == "x" else 9.0
        assert resolve(space, lambda name, _, a=a, b=b: {"a": a, "b": b, "c": 0.25}[name])["c"] == expected


def test_extremes_are_the_reference_and_every_end_alone_and_in_pairs():
    space = {
        "rate": parameter(loguniform=[0.1, 10.0]),
        "size": parameter(int=[2, 800]),
        "policy": parameter(choice=["a", "b", "c"]),
    }
    ends = {"rate": [0.1, 10.0], "size": [2, 800], "policy": ["a", "b", "c"]}
    reference = {"rate": 1.0, "size": 4, "policy": "b"}
    expected = [reference]
    for first, ones in ends.items():
        for second, twos in ends.items():
            for one, two in product(ones, twos):
                expected.append({**reference, first: one})
                if first != second:
                    expected.append({**reference, first: one, second: two})
    found = list(extremes(space, reference))
    assert found[0] == reference
    assert {tuple(sorted(setting.items())) for setting in found} == {tuple(sorted(s.items())) for s in expected}


def test_extremes_follow_the_conditions():
    space = {
        "weight": parameter(uniform=[0.0, 0.9], when={"repeats": [2, 3]}, otherwise=1.0),
        "repeats": parameter(choice=[1, 2, 3]),
    }
    found = {(setting["repeats"], setting["weight"]) for setting in extremes(space, {"weight": 0.5, "repeats": 3})}
    # With one repeat the weight is 1, whatever was to be drawn for it.
    assert found == {(1, 1.0), (2, 0.0), (2, 0.5), (2, 0.9), (3, 0.0), (3, 0.5), (3, 0.9)}


def test_extremes_of_an_empty_space_are_the_one_empty_setting():
    assert list(extremes({}, {})) == [{}]


@pytest.mark.parametrize(
    ("fields", "inside", "outside"),
    [
        ({"uniform": [0.5, 2.0]}, [0.5, 1, 1.999, 2.0], [0.499, 2.001, "1", True]),
        ({"loguniform": [0.001, 1.0]}, [0.001, 0.5, 1], [0.0009, 0, -1, 1.1]),
        ({"int": [2, 5]}, [2, 3, 5, 4.0], [1, 6, 2.5, "3", True]),
        ({"choice": ["full", 2, 0.5]}, ["full", 2, 0.5], ["torch", 3, 0.25]),
        ({"choice": [False, True]}, [False, True], ["True", 2]),
    ],
)
def test_a_parameter_contains_what_a_search_could_draw(fields, inside, outside):
    searched = parameter(**fields)
    assert [value for value in inside if not searched.contains(value)] == []
    assert [value for value in outside if searched.contains(value)] == []


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({"uniform": [0, 1]}, (0.0, 1.0)),
        ({"loguniform": [0.1, 10]}, (0.1, 10.0)),
        ({"int": [2, 5]}, (2, 3, 4, 5)),
        ({"int": [2, 500]}, (2, 500)),
        ({"choice": ["a", True, 3, 0.5]}, ("a", True, 3, 0.5)),
    ],
)
def test_ends_are_the_bounds_or_all_choices(fields, ends):
    found = parameter(**fields).ends
    assert found == ends
    assert list(map(type, found)) == list(map(type, ends))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "exactly one"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"int": [3, 2]}, "low < high"),
        ({"loguniform": [0, 1]}, "low > 0"),
        ({"choice": [1, 2, 1]}, "must differ"),
        ({"choice": []}, "at least 1"),
        ({"choice": [[1], 2]}, "finite number, a string"),
        ({"choice": [float("nan")]}, "finite number"),
        ({"uniform": [0.0, float("inf")]}, "finite number"),
        ({"uniform": [0, 1], "otherwise": 1}, "belong together"),
        ({"uniform": [0, 1], "when": {"a": [1]}}, "belong together"),
        ({"uniform": [0, 1], "step": 1}, "not permitted"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        parameter(**fields)


RANGE = {"uniform": [0.0, 1.0], "otherwise": 0.5}


@pytest.mark.parametrize(
    ("space", "wrong"),
    [
        ({"a": {**RANGE, "when": {"b": [2]}}, "b": {"int": [1, 3]}}, {}),
        ({"a": {**RANGE, "when": {"c": [2]}}, "b": {"int": [1, 3]}}, {"a": ["c", "known: a, b"]}),
        ({"a": {**RANGE, "when": {"b": [2, 4]}}, "b": {"int": [1, 3]}}, {"a": ["values that b can have", "[4]"]}),
        ({"a": {**RANGE, "when": {"a": [0.5]}}}, {"a": ["ring", "a"]}),
        (
            {"a": {**RANGE, "when": {"b": [0.5]}}, "b": {**RANGE, "when": {"a": [0.5]}}, "c": {"int": [1, 3]}},
            {"a": ["ring", "a, b"], "b": ["ring", "a, b"]},
        ),
        # What hangs on a ring is not in it: dropping its condition would not open the ring.
        (
            {
                "a": {**RANGE, "when": {"b": [0.5]}},
                "b": {**RANGE, "when": {"a": [0.5]}},
                "c": {**RANGE, "when": {"a": [0.5]}},
            },
            {"a": ["ring", "a, b"], "b": ["ring", "a, b"]},
        ),
    ],
    ids=["right", "unknown", "impossible", "itself", "ring", "beside a ring"],
)
def test_wrong_conditions_are_told_for_each_parameter(space, wrong):
    found = space_problems({name: parameter(**fields) for name, fields in space.items()})
    assert set(found) == set(wrong)
    for name, parts in wrong.items():
        assert [part for part in parts if part not in str(found[name])] == []


# Few letters, so that keys meet.
KEYS = st.text("ab- ", min_size=1, max_size=2)
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text("a.", max_size=3))
TWIGS = st.dictionaries(KEYS, SCALARS, min_size=1, max_size=3)
TREES = st.dictionaries(KEYS, SCALARS | TWIGS | st.dictionaries(KEYS, SCALARS | TWIGS, min_size=1, max_size=3))


def leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key)), value


@quick
@given(TREES)
def test_a_tree_taken_apart_by_paths_comes_together_again(tree):
    flat = dict(leaves(tree))
    assert nested(flat, {}) == tree
    assert {path: lookup(tree, path) for path in flat} == flat


@quick
@given(TREES, TREES)
def test_values_put_into_a_tree_leave_the_rest_and_the_tree_itself_alone(base, change):
    before = copy.deepcopy(base)
    flat = dict(leaves(change))
    merged = nested(flat, base)
    assert base == before
    assert [path for path, value in flat.items() if lookup(merged, path) != value] == []
    for path, value in leaves(base):
        # A path goes only where another one covers it, or runs through it.
        if not any(f"{path}.".startswith(f"{new}.") or f"{new}.".startswith(f"{path}.") for new in flat):
            assert lookup(merged, path) == value


@pytest.mark.parametrize("path", ["b", "a.c", "a.b.c", "a.b.c.d", "", "a."])
def test_a_path_that_leads_nowhere_is_a_key_error(path):
    with pytest.raises(KeyError):
        lookup({"a": {"b": 1}}, path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (1e-7, "1e-07"), (3.0, "3"), (123456, "123456"), (True, "True"), ("full", "full")],
)
def test_numbers_are_shown_with_four_digits(value, text):
    assert shown(value) == text
