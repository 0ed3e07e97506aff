"""A search on a cluster that grows for it and shrinks after it: Ray's own autoscaler, with simulated nodes."""

import json
import os
import statistics
import subprocess
import sys

import growing
import pytest
import toy
from commands import python_path

from grainmill.cluster.shape import Cluster, NodeType
from grainmill.config.experiment import experiment_model
from grainmill.workflows import forecast
from grainmill.workflows.forecast import Pace

ISOLATED = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]


def permitted():
    try:
        line = [*ISOLATED, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "peer"]
        return subprocess.run(line, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not permitted(), reason="needs namespaces of its own, by unshare and ip, which are not permitted"
    ),
]


def seen(folder, settings):
    """What was seen of the run; prints it beside the forecast, which is given the epochs and the start as they were."""
    line = [*ISOLATED, sys.executable, growing.__file__, str(folder), json.dumps(settings)]
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # Ray speaks there, too
    came, went = rounded(found["came"]), rounded(found["went"])
    told = [
        f"asked for {found['asked']} at once; nodes came at {came}, went at {went}, the end at {found['ended']:.1f}"
    ]
    wave = settings["nodes"] * settings["cpus"] // settings["workers"]
    epoch = forecast.epoch_seconds(folder)
    starts = sorted(when - epoch for when, _, _, at in found["trials"] if at == 1)
    told += [f"first trials at {rounded(starts[:wave])}, {epoch:.2f} seconds an epoch"]
    worker = NodeType("worker", {"CPU": settings["cpus"]}, settings["nodes"])
    on = Cluster(NodeType("head", {"CPU": 0}, 1), (worker,), settings["nodes"], settings["idle"])
    boot = statistics.fmean(found["came"])
    pace = Pace(epoch, boot, statistics.fmean(starts[:wave]) - boot)
    run = forecast.simulate(experiment_model(toy).model_validate(growing.content(settings)), on, pace, 0)
    comparisons = [("seconds of the search", end(found, "trial"), run.search)]
    if settings["seeds"]:
        comparisons += [
            ("seconds of the best again", end(found, "final") - end(found, "trial"), run.retraining),
            ("seconds in all", found["ended"], run.search + run.retraining),
            ("node-seconds", sum(found["went"]), run.nodes["worker"]),  # all were asked for at the start
        ]
    told += [f"{what}: {real:.0f}, forecast {said:.0f} ({said / real - 1:+.0%})" for what, real, said in comparisons]
    print("", *told, sep="\n")
    return found


def end(found, study):
    """When the last trial of a study was complete."""
    return max(when for when, name, state, _ in found["trials"] if name.startswith(study) and state == "complete")


def rounded(times):
    return [round(when, 1) for when in times]


def ends_well(found, settings):
    assert set(found["states"]) == {"complete"}
    assert len(found["states"]) == settings["trials"] + settings["seeds"]
    assert len(found["came"]) == len(found["went"]) == settings["nodes"]
    assert set(found["groups"]) == {"REMOVED"}


def test_whole_wave_is_asked_for_at_once_from_no_node_and_none_is_left(tmp_path):
    settings = {"nodes": 3, "cpus": 1, "workers": 1, "trials": 7, "epochs": 4, "seconds": 2, "seeds": 2}
    settings |= {"idle": 12, "v2": True}
    found = seen(tmp_path, settings)
    ends_well(found, settings)
    assert found["asked"] == 3


def test_groups_ask_for_their_workers_at_once_and_none_is_left(tmp_path):
    settings = {"nodes": 4, "cpus": 1, "workers": 2, "trials": 4, "epochs": 4, "seconds": 1, "seeds": 0}
    settings |= {"idle": 12, "v2": True}
    found = seen(tmp_path, settings)
    ends_well(found, settings)
    assert found["asked"] == 2
