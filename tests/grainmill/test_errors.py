"""Errors reach another process whole."""

import pickle

from grainmill.errors import ExperimentError, Problem


def test_an_error_of_several_problems_reaches_another_process_whole():
    error = ExperimentError("my.yaml", [Problem(3, "epochs", "must be 1 or more, got 0"), Problem(None, "", "empty")])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.file, copy.problems, str(copy)) == (error.file, error.problems, str(error))
