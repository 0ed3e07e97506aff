import pickle

from multigrain.errors import DataError


def test_an_error_of_several_problems_reaches_another_process_whole():
    error = DataError(["a.jpg is cut short; leave it out", "b.jpg is empty; leave it out"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, str(copy)) == (error.problems, str(error))
