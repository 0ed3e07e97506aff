"""A search of the toy on Ray's simulated cluster, which grows from no node and shrinks to none; what was seen, as JSON.

    unshare --net --pid --mount --fork --mount-proc --kill-child python tests/growing.py FOLDER SETTINGS

For `test_growing`, in namespaces of its own: two Rays on one machine meddle with each other, and what this starts ends
with its first process. SETTINGS is JSON: `nodes` at most, of `cpus` each; `workers` of a trial, `trials`, `epochs` of
so many `seconds`; `seeds` from which the best is trained again, or 0; `idle` seconds until a node goes; `v2` or not
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "OMP_NUM_THREADS": "1"}

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""The id of the head that Ray's simulated provider knows."""
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "launch_multiple": True,
    "head_node_id": HEAD,
}
BYTES = 80 * 2**20
"""Of each node's object store."""


def isolate(folder):
    """A network that ends here, and a folder for Ray that no other Ray sees."""
    private = folder / "ray"
    private.mkdir(parents=True)
    shared = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")
    shared.mkdir(exist_ok=True)
    for line in (
        f"mount --bind {private} {shared}",
        "ip link set lo up",
        "ip link add eth0 type veth peer name peer",
        "ip addr add 10.90.0.1/24 dev eth0",
        "ip link set eth0 up",
        "ip link set peer up",
        "ip route add default via 10.90.0.2",
    ):
        subprocess.run(line.split(), check=True)


def start(folder, settings):
    """The head, and the autoscaler that makes nodes of what is asked for."""
    config = {
        "cluster_name": "growing",
        "max_workers": settings["nodes"],
        "idle_timeout_minutes": settings["idle"] / 60,
        "upscaling_speed": settings["nodes"],
        "provider": PROVIDER,
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": settings["cpus"], "object_store_memory": BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": settings["nodes"],
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
    }
    for key in ("docker", "file_mounts"):
        config[key] = {}
    for key in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        config[key] = []
    config |= {"head_start_ray_commands": [], "worker_start_ray_commands": [], "cluster_synced_files": []}
    config |= {"file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": []}
    file = folder / "cluster.json"
    file.write_text(json.dumps(config))
    environment = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment |= {"RAY_enable_autoscaler_v2": "1" if settings["v2"] else "0"}
    environment |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    line = ["start", "--head", "--num-cpus=0", "--port=6379", f"--object-store-memory={BYTES}"]
    subprocess.run(
        [Path(sys.executable).parent / "ray", *line, f"--autoscaling-config={file}"],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
    )


class Attendance(threading.Thread):
    """When nodes came, and when they went, in seconds since the search began; what was asked for before the first."""

    def __init__(self, began):
        super().__init__(daemon=True)
        self.began, self.came, self.went, self.asked = began, {}, {}, 0

    def run(self):
        import ray

        while True:
            now = time.monotonic() - self.began
            there = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
            if not there and not self.came:
                waiting = [group["state"] for group in ray.util.placement_group_table().values()].count("PENDING")
                self.asked = max(self.asked, waiting)
            for node in there - self.came.keys():
                self.came[node] = now
            for node in self.came.keys() - there - self.went.keys():
                self.went[node] = now
            time.sleep(0.2)


class Diary:
    """An `Observer` with the times."""

    def __init__(self, began):
        self.began, self.notes, self.trials = began, [], []

    def message(self, message):
        self.notes.append((time.monotonic() - self.began, message))

    def trial(self, name, record):
        epoch = int(record.metrics.get("epoch", 0))
        self.trials.append((time.monotonic() - self.began, name, record.state, epoch))


def content(settings):
    """Of the experiment file."""
    return {
        "name": "toy",
        "trainable": "toy",
        "data": {},
        "base": {"epochs": settings["epochs"], "seconds": settings["seconds"]},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "objective": {"score": "max"},
        "search": {"trials": settings["trials"], "scheduler": "none"},
        "winner": {"candidates": 1, "seeds": settings["seeds"] or 1},
        "resources": {"workers": settings["workers"], "retrain_workers": settings["workers"]},
    }


def mill(folder, settings, observer):
    """The search, and the training of the best again, as `grainmill tune` runs them; the records of both."""
    import toy

    from grainmill.config.experiment import experiment_model
    from grainmill.execution import runner
    from grainmill.execution.training_job import StudySetup
    from grainmill.search.study import Study
    from grainmill.tracking.mlflow_runs import Tracker, local_uri

    checked = experiment_model(toy).model_validate(content(settings))
    tracker = Tracker(local_uri(folder), "toy", folder)
    parent, records = tracker.start("parent", {}), []
    for name, first, count in (
        ("trial", checked.first, settings["trials"]),
        ("final", [{"height": 0.1 * number} for number in range(settings["seeds"])], settings["seeds"]),
    ):
        if not count:
            continue
        study = Study(f"sqlite:///{folder / 'study.db'}", name, checked, first, count)
        setup = StudySetup(name, "toy", toy.Data(), folder, checked.resources, settings["workers"])
        runner.run(setup, study, tracker, parent, observer)
        records += study.records
    return records


def main(folder, settings):
    isolate(folder)
    start(folder, settings)
    import ray

    here = os.pathsep.join(path for path in sys.path if path)
    environment = {"PYTHONPATH": here, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
    began = time.monotonic()
    nodes, observer = Attendance(began), Diary(began)
    nodes.start()
    records = mill(folder, settings, observer)
    ended = time.monotonic() - began
    deadline = ended + settings["idle"] + 60
    while len(nodes.went) < len(nodes.came) and time.monotonic() - began < deadline:
        time.sleep(0.2)
    seen = {
        "asked": nodes.asked,
        "came": sorted(nodes.came.values()),
        "went": sorted(nodes.went.values()),
        "ended": ended,
        "states": [record.state for record in records],
        "busy": sum(record.cost["cpu_seconds"] for record in records),
        "trials": observer.trials,
        "groups": [group["state"] for group in ray.util.placement_group_table().values()],
    }
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
