"""Run a search of the toy on Ray's simulated autoscaling cluster, and print what was observed as JSON.

    unshare --net --pid --mount --fork --mount-proc --kill-child python tests/support/growing.py FOLDER SETTINGS

The cluster starts without a worker node, grows for the search and shrinks to none after it. The script runs in
namespaces of its own, because two Ray clusters on one machine disturb each other, and so that all its processes end
with its first one. SETTINGS is a JSON object:

    nodes    highest number of worker nodes
    cpus     CPUs of each worker node
    workers  workers of each trial
    trials   trials of the search
    epochs   epochs of each trial
    seconds  duration of an epoch
    seeds    trainings of the best trial after the search, or 0
    idle     seconds after which an idle node is removed
    v2       true for version 2 of Ray's autoscaler
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
"""Node id of the head in Ray's simulated node provider."""
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
"""Size of the object store of each node."""


def isolate(folder):
    """Make a network without a way out, and a folder for Ray sessions that no other Ray sees."""
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
    """Start the head node with the autoscaler."""
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
    """Records when each node joined and left, in seconds since the search began.

    `asked` is the largest number of placement groups that were pending before the first node joined.
    """

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
    """An `Observer` that keeps messages and trials with their times."""

    def __init__(self, began):
        self.began, self.notes, self.trials = began, [], []

    def message(self, message):
        self.notes.append((time.monotonic() - self.began, message))

    def trial(self, name, record):
        epoch = int(record.metrics.get("epoch", 0))
        self.trials.append((time.monotonic() - self.began, name, record.state, epoch))


def content(settings):
    """Content of the experiment file."""
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


def run_search(folder, settings, observer):
    """Run the search and the final trainings as `grainmill tune` does, and return the records of both."""
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
    records = run_search(folder, settings, observer)
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
