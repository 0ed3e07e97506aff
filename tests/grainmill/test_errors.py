"""Texts of errors: what they leave out, and that they reach another process whole."""

import pickle

import pytest

from grainmill.errors import ExperimentError, Problem, hidden


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no answer at http://me:p@ss@host:5000/x; start it", "no answer at http://host:5000/x; start it"),
        ("postgresql://mill:pass/word@host/db", "postgresql://host/db"),
        ("https://host/a and s3://key@bucket", "https://host/a and s3://bucket"),
        ("models:/demo@champion by a@b", "models:/demo@champion by a@b"),
        ('{"a": "s3://bucket/x","b": "me@host"}', '{"a": "s3://bucket/x","b": "me@host"}'),
    ],
)
def test_users_and_passwords_in_addresses_are_hidden(text, shown):
    assert hidden(text) == shown


def test_an_error_of_several_problems_reaches_another_process_whole():
    error = ExperimentError("my.yaml", [Problem(3, "epochs", "must be 1 or more, got 0"), Problem(None, "", "empty")])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.file, copy.problems, str(copy)) == (error.file, error.problems, str(error))
