"""Trials of the toy on real Ray: alone in a process, and as a group of two."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray
import toy
from arena import Bench
from mlflow_tables import database
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from grainmill.cluster import capacity
from grainmill.errors import ResourceError
from grainmill.execution import placement, trial_callback
from grainmill.tracking.mlflow_runs import Tracker

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    return Tracker(database(storage), "toy", storage)


@pytest.fixture
def bench(tmp_path, tracker, observer):
    return Bench(tmp_path, tracker, observer)


class Taker:
    """Takes room, as Ray Train's controllers do."""

    def take(self, cpus):
        taken = placement_group([{"CPU": cpus}])
        ray.get(taken.ready())
        return taken

    def id(self):
        return ray.get_runtime_context().get_actor_id()

    def die(self):
        os._exit(0)


def taker(cpus):
    """One, and what it has taken."""
    made = ray.remote(Taker).options(num_cpus=0).remote()
    return made, ray.get(made.take.remote(cpus))


def died(actor):
    with pytest.raises(RayActorError):
        ray.get(actor.die.remote())


def test_room_that_the_dead_have_taken_is_given_back_and_no_other():
    (dead, of_the_dead), (alive, of_the_living) = taker(0.5), taker(0.5)
    own = placement_group([{"CPU": 0.5}])
    ray.get(own.ready())

    def states():
        return [placement_group_table(one)["state"] for one in (of_the_dead, of_the_living, own)]

    died(dead)
    assert states() == ["CREATED"] * 3  # Ray keeps it
    placement.free_orphaned()
    assert states() == ["REMOVED", "CREATED", "CREATED"]
    placement.free_orphaned(bytes.fromhex(ray.get(alive.id.remote())))
    assert states() == ["REMOVED", "REMOVED", "CREATED"]
    remove_placement_group(own)


def test_search_whose_room_the_dead_have_taken_gets_it(bench, monkeypatch):
    monkeypatch.setattr(trial_callback, "WAIT_SECONDS", 0.5)
    died(taker(2)[0])
    (record,) = bench.run(bench.study(1))
    assert record.state == "complete"
    assert bench.observer.notes[0] == "waiting for the cluster: a trial needs 1 CPU (0 of 2 free)"


def test_every_trial_has_one_run_with_all_its_epochs_and_a_final_state(bench):
    records = bench.run(bench.study(3, search={"scheduler": "none"}))
    assert [record.state for record in records] == ["complete"] * 3
    runs = bench.child_runs()
    assert sorted(runs) == ["trial-0000", "trial-0001", "trial-0002"]
    for record in records:
        run = runs[f"trial-{record.number:04d}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["state"] == "complete at epoch 4"
        assert float(run.data.params["height"]) == record.setting["height"]
        history = bench.tracker.client.get_metric_history(run.info.run_id, "score")
        expected = [(epoch, record.setting["height"] * epoch / 4) for epoch in (1, 2, 3, 4)]
        assert [(metric.step, metric.value) for metric in history] == expected
    assert sorted(bench.computed()) == sorted(f"trial-{n:04d} {epoch}" for n in range(3) for epoch in (1, 2, 3, 4))


def test_trial_that_raises_fails_with_its_cause_and_the_others_go_on(bench):
    # The published setting is `plain`, all others are `broken`.
    study = bench.study(2, space={"kind": {"choice": ["broken"]}}, search={"scheduler": "none"})
    fine, broken = bench.run(study)
    assert [fine.state, broken.state] == ["complete", "failed"]
    assert "the toy is broken" in broken.cause
    run = bench.child_runs()[f"trial-{broken.number:04d}"]
    assert (run.info.status, run.data.tags["state"]) == ("FAILED", "failed at epoch 1")


def test_weak_trials_are_stopped_early_and_the_watch_hears_of_all(bench):
    study = bench.study(6, search={"grace_epochs": 1, "reduction": 2, "sampler": "random"})
    records = bench.run(study, concurrent=1)
    stopped = [record for record in records if record.state == "stopped"]
    assert stopped
    assert all(1 <= record.metrics["epoch"] < 4 for record in stopped)
    assert records[0].state == "complete"
    heard = {name: state for name, state, _ in bench.observer.trials}
    assert heard == {f"trial-{record.number:04d}": record.state for record in records}
    first = [(state, epoch) for name, state, epoch in bench.observer.trials if name == "trial-0000"]
    assert first == [*(("running", epoch) for epoch in range(5)), ("complete", 4)]


def test_trial_left_running_goes_on_from_its_checkpoint_in_its_own_run(bench):
    study = bench.study(1)
    record = study.ask()
    spec = toy.Spec(height=record.setting["height"])
    run_id = bench.tracker.start("trial-0000", {}, bench.parent)
    left = toy.fit(spec, toy.Data(diary=str(bench.diary)), Path(bench.setup().checkpoint_folder(0)))
    first = next(left).metrics
    bench.tracker.log(run_id, 1, {"epoch": 1, **first})
    study.report(0, {"epoch": 1, **first})
    next(left)  # a second epoch was computed, but its report got lost

    (record,) = bench.run(bench.study(1))
    assert record.state == "complete"
    assert bench.computed() == [f"trial-0000 {epoch}" for epoch in (1, 2, 3, 4)]
    history = bench.tracker.client.get_metric_history(run_id, "score")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert list(bench.child_runs()) == ["trial-0000"]


def test_finished_study_is_not_run_again(bench):
    bench.run(bench.study(1))
    before = bench.computed()
    bench.run(bench.study(1))
    assert bench.computed() == before


def test_two_workers_train_as_one_group_on_as_many_cpus_as_there_are(bench):
    (record,) = bench.run(bench.study(1), workers=2)
    assert record.state == "complete"
    assert record.metrics["world_size"] == 2
    assert [row["epoch"] for row in record.history] == [1, 2, 3, 4]
    assert bench.computed() == [f"trial-0000 {epoch}" for epoch in (1, 2, 3, 4)]


def test_group_whose_worker_raises_fails_with_its_cause(bench):
    (record,) = bench.run(bench.study(1, space={}, base={"kind": "broken"}), workers=2)
    assert record.state == "failed"
    assert "the toy is broken" in record.cause


@pytest.mark.parametrize(
    ("workers", "resources", "missing"),
    [
        (1, {"cpus_per_worker": 3}, r"needs 3 CPU, .* more than 2 CPU \(node: 2 CPU\); lower cpus_per_worker to 2"),
        (2, {"gpus_per_worker": 1}, r"needs 1 CPU and 1 GPU, .* more than 0 GPU .* lower gpus_per_worker to 0"),
        (3, {}, r"3 workers of 1 CPU each, .* room for 2 at most .* lower the workers to 2"),
    ],
)
def test_trial_larger_than_the_cluster_is_refused_naming_what_is_missing(bench, workers, resources, missing):
    with pytest.raises(ResourceError, match=missing):
        bench.run(bench.study(1), workers, **resources)


def at_once(bench, **resources):
    setup = bench.setup(**resources)
    return capacity.trials_at_once(setup.need, setup.resources.concurrent, bench.observer.message)


def test_as_many_are_asked_for_at_once_as_the_cluster_holds(bench):
    assert at_once(bench) == 2
    assert at_once(bench, workers=2) == 1
    assert at_once(bench, workers=(1, 2)) == 1
    assert bench.observer.notes == []


def test_trial_fits_if_its_fewest_workers_do(bench):
    assert at_once(bench, workers=(2, 5)) == 1
    with pytest.raises(ResourceError, match=r"needs 3 workers of 1 CPU each, but the cluster has room for 2 at most"):
        at_once(bench, workers=(3, 5))


def test_spread_workers_need_a_node_each_unless_their_number_is_open(bench):
    with pytest.raises(
        ResourceError, match=r"a node for each of its 2 workers, but the cluster has 1 that can hold one;"
    ):
        at_once(bench, workers=2, placement="spread")
    assert at_once(bench, workers=(2, 3), placement="spread") == 1
    assert at_once(bench, workers=1, placement="spread") == 2


def test_trial_that_waits_says_what_its_fewest_workers_lack(bench):
    assert re.fullmatch(
        r"waiting for the cluster: a trial needs 3 CPU \([012] of 2 free\)",
        placement.missing_resources(bench.setup(workers=(3, 5))),
    )
    told = placement.missing_resources(bench.setup(workers=3, placement="spread", cpus_per_worker=2))
    assert told.endswith("3 nodes for its workers (1 there)")


def test_local_ray_heeds_our_sigterm_and_leaves_no_process():
    script = textwrap.dedent("""
        import signal, ray
        from grainmill.cluster.session import connect
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with connect(None):
                print(ray.get_runtime_context().get_node_id(), flush=True)
                print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
                signal.pause()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    node, session = process.stdout.readline(), process.stdout.readline().strip()
    assert node.strip() != ray.get_runtime_context().get_node_id()
    process.terminate()
    assert process.communicate()[0] == "interrupted\n"
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert session not in commands


def test_cluster_of_other_versions_is_refused_with_both():
    script = """
        import sys, ray
        ray.__version__ = "2.59.1"  # what the driver says of itself
        from grainmill.errors import ResourceError
        from grainmill.cluster.session import connect
        try:
            with connect(sys.argv[1]):
                print("in")
        except ResourceError as error:
            print(error)
        print(ray.is_initialized())
    """
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", textwrap.dedent(script), address]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    python = ".".join(map(str, sys.version_info[:3]))
    theirs = f"Ray {ray.__version__} and Python {python}"
    assert told == (
        f"a cluster must have the versions of this command, Ray 2.59.1 and Python {python}, but the one at {address} "
        f"has {theirs}; install those here, or these there\nFalse\n"
    )


def test_losers_that_pause_go_on_from_their_checkpoint_or_are_stopped_in_the_end(bench):
    heights = [{"height": height} for height in (0.9, 0.8, 0.1, 0.05, 0.01)]
    search = {"losers": "pause", "grace_epochs": 1, "reduction": 2, "first": heights}
    records = bench.run(bench.study(6, search=search), concurrent=1)
    states = {record.setting["height"]: record.state for record in records}
    # In turn, at epoch 1: 0.5, the published one, and 0.9 go on; 0.8 is the second of three, within 3/2; 0.1 pauses,
    # and so does what is worse. At epoch 2 meet 0.5, 0.9 and 0.8 likewise. Of six, three are good: 0.9, 0.8, 0.5.
    assert states == {
        0.5: "complete",
        0.9: "complete",
        0.8: "complete",
        0.1: "stopped",
        0.05: "stopped",
        0.01: "stopped",
    }
    assert len(bench.computed()) == len(set(bench.computed())) == 3 * 4 + 3
    paused = {name for name, state, _ in bench.observer.trials if state == "paused"}
    assert paused == {"trial-0003", "trial-0004", "trial-0005"}
    runs = bench.child_runs()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["trial-0004"].data.tags["state"] == "stopped at epoch 1"


def test_paused_trial_that_turns_out_to_be_good_goes_on_from_its_checkpoint_in_its_run(bench):
    heights = [{"height": height} for height in (0.9, 0.6, 0.1, 0.05)]
    search = {"losers": "pause", "grace_epochs": 2, "reduction": 3, "first": heights}
    records = bench.run(bench.study(5, search=search), concurrent=1)
    # At epoch 2: 0.9 goes on; 0.6, the second of three, pauses; with four it is within 4/3 and goes on.
    by_height = {record.setting["height"]: record for record in records}
    assert by_height[0.6].state == "complete"
    heard = [(state, epoch) for name, state, epoch in bench.observer.trials if name == "trial-0002"]
    assert heard.index(("paused", 2)) < heard.index(("running", 3)) < heard.index(("complete", 4))
    computed = [line for line in bench.computed() if line.startswith("trial-0002")]
    assert computed == [f"trial-0002 {epoch}" for epoch in (1, 2, 3, 4)]
    history = bench.tracker.client.get_metric_history(bench.child_runs()["trial-0002"].info.run_id, "score")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_budget_that_is_spent_ends_the_search_and_what_runs(bench):
    records = bench.run(bench.study(50, budget={"cpu_hours": 1e-9}, search={"scheduler": "none"}), concurrent=1)
    assert [(record.state, record.metrics["epoch"]) for record in records] == [("stopped", 1)]
    assert records[0].cost["cpu_seconds"] > 0
    assert records[0].cost["gpu_seconds"] == 0


def test_every_epoch_has_its_cost_and_it_can_be_an_objective(bench):
    objective = {"score": "max", "cpu_seconds": "min"}
    first, second = bench.run(bench.study(2, objective=objective, search={"scheduler": "none"}), concurrent=1)
    for record in (first, second):
        costs = [row["cpu_seconds"] for row in record.history]
        assert costs == sorted(costs)
        assert costs[0] > 0
        assert record.cost["cpu_seconds"] >= costs[-1]
        assert record.variants == {"twice": {"score": 2 * record.setting["height"]}}


def test_cluster_that_is_to_grow_is_waited_for_with_a_word(bench):
    study = bench.study(1, search={"scheduler": "none"})
    assert at_once(bench, cpus_per_worker=3, concurrent=2) == 2
    (note,) = bench.observer.notes
    assert note.startswith("waiting for the cluster to grow: one worker needs 3 CPU")
    assert at_once(bench, concurrent=1) == 1
    assert study.remaining == 1


def test_run_that_a_killed_process_opened_is_the_trials_own(bench):
    study = bench.study(1)
    study.ask()
    left = bench.tracker.start("trial-0000", {}, bench.parent)
    (record,) = bench.run(bench.study(1))
    (run,) = bench.child_runs().values()
    assert (run.info.run_id, run.info.status) == (left, "FINISHED")
    assert float(run.data.params["height"]) == record.setting["height"]


def test_mlflow_is_told_in_the_end_what_a_killed_process_could_not_tell(bench):
    study = bench.study(2, search={"scheduler": "none"})
    for number in (0, 1):
        study.ask()
        run_id = bench.tracker.start(f"trial-{number:04d}", {"state": "running"}, bench.parent)
        for epoch in (1, 2, 3, 4):
            row = {"epoch": epoch, "score": float(epoch), "cost": 1.0}
            study.report(number, row)
            if epoch < 3:
                bench.tracker.log(run_id, epoch, row)
        study.close(number, failed=False)
    bench.tracker.set_status(run_id, "FINISHED")  # was closed, and is left alone
    bench.run(bench.study(2, search={"scheduler": "none"}))
    run = bench.child_runs()["trial-0000"]
    assert (run.info.status, run.data.tags["state"]) == ("FINISHED", "complete at epoch 4")
    history = bench.tracker.client.get_metric_history(run.info.run_id, "score")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [metric.step for metric in bench.tracker.client.get_metric_history(run_id, "score")] == [1, 2]
