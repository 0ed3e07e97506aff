"""Studies whose database fails, and those that are carried on."""

import shutil

import pytest
import sqlalchemy
from studies import searched, trained

from grainmill.errors import StorageError


def engine(study):
    return study._study._storage._backend.engine


class Outage:
    """The database answers no commit from the `first` on, so many times."""

    def __init__(self, study, first, times):
        self.seen, self.first, self.times = 0, first, times
        sqlalchemy.event.listen(engine(study), "commit", self._commit)

    def _commit(self, connection):
        self.seen += 1
        if self.first <= self.seen < self.first + self.times:
            raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception("gone"))


def test_no_commit_that_fails_once_loses_or_doubles_anything(tmp_path, prompt, opened):
    def open_copy(name):
        file = shutil.copy(tmp_path / "new.db", tmp_path / f"{name}.db")
        return opened(f"sqlite:///{file}", trials=2, base={"epochs": 2})

    opened(f"sqlite:///{tmp_path / 'new.db'}", trials=2, base={"epochs": 2})  # making the tables takes longest
    count = Outage(calm := open_copy("calm"), 0, 0)
    expected = sorted(map(str, (row[2:] for row in searched(calm, epochs=2))))
    assert count.seen > 30
    for number in range(1, count.seen + 1):
        study = open_copy(number)
        Outage(study, number, 1)
        # Numbers may differ, and what stands before the others.
        found = sorted(map(str, (row[2:] for row in searched(study, epochs=2))))
        assert found == expected, f"commit {number} of {count.seen}"


def test_search_that_is_carried_on_draws_what_it_would_have_drawn(tmp_path, opened):
    calm = searched(opened(f"sqlite:///{tmp_path / 'calm.db'}"))
    for _ in range(3):
        study = opened(f"sqlite:///{tmp_path / 'cut.db'}")
        trained(study, study.ask())
    assert searched(opened(f"sqlite:///{tmp_path / 'cut.db'}")) == calm
    assert len({record[2]["height"] for record in calm}) == 4


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "qmc", "random"])
def test_search_that_is_carried_on_draws_nothing_twice(tmp_path, opened, sampler):
    for count in range(1, 7):
        study = opened(f"sqlite:///{tmp_path / 'study.db'}", trials=12, search={"sampler": sampler})
        study.ask(), study.ask()
        assert len({record.setting["height"] for record in study.records}) == 2 * count


def test_study_whose_file_is_emptied_is_not_begun_anew(tmp_path, opened):
    file = tmp_path / "study.db"
    opened(f"sqlite:///{file}", trials=2)
    file.write_bytes(b"")
    with pytest.raises(StorageError, match=f"a study needs a SQLite file to read and write, but {file} is empty"):
        opened(f"sqlite:///{file}", trials=2)
