"""A training whose folder is in S3, as a worker runs it: without Ray, with the toy and with real images."""

import json
from contextlib import closing

import pytest
from test_remote import bucket, moto, waits  # noqa: F401  # fixtures
from test_vault import place, proxy, seen_by_another  # noqa: F401

from grainmill.errors import StorageError
from grainmill.worker import Job, epochs


def test_an_epoch_is_safe_before_it_is_told_and_another_machine_goes_on_from_it(place, tmp_path):  # noqa: F811
    job = Job("toy", {"epochs": 4}, {"diary": str(tmp_path / "diary")}, place)
    with closing(epochs(job)) as results:
        for epoch in (1, 2):
            assert next(results)["epoch"] == epoch
            assert json.loads(seen_by_another(place)["state.json"])["epoch"] == epoch
    assert list((tmp_path / "work").glob("*/*")) == []
    assert [row["epoch"] for row in epochs(job)] == [2, 3, 4]  # the last one again: its reader may have died
    computed = (tmp_path / "diary").read_text().split()[1::2]
    assert computed == ["1", "2", "3", "4"]


def test_a_training_ends_with_the_reason_why_its_checkpoint_is_not_safe(place, proxy, monkeypatch):  # noqa: F811
    job = Job("toy", {"epochs": 4}, {}, place)
    with closing(epochs(job)) as results:
        next(results)
        proxy.rule = lambda method, *_: (400, "ExpiredToken") if method == "PUT" else None
        with pytest.raises(StorageError, match=f"{place}/state.json needs credentials that are still good"):
            next(results)
