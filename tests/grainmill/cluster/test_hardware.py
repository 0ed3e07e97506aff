import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray

from grainmill.cluster import hardware
from grainmill.errors import ResourceError


def test_the_machine_is_told():
    told = hardware.machine()
    assert set(told) == {"cpu", "memory", "gpu"}
    assert told["cpu"].split(" x ")[0].isdigit()
    assert float(told["memory"].removesuffix(" GiB")) > 0


@pytest.mark.parametrize(
    ("given", "seen", "lacks"), [([], False, False), ([0], False, True), ([0], True, False), ([0, 1], False, True)]
)
def test_worker_that_sees_no_gpu_refuses_to_work_only_if_it_was_given_one(given, seen, lacks, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    cuda = SimpleNamespace(is_available=lambda: seen)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.15.0+cpu"))
    assert hardware.lacks_gpu() == lacks
    refusal = pytest.raises(ResourceError, match=r"must train on it, but PyTorch 2.15.0\+cpu sees none on \S+; install")
    with refusal if lacks else nullcontext():
        hardware.check_gpu()
