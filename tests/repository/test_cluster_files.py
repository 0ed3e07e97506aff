"""The files of infra/ that make clusters: by Ray's own checks where there are any, else by their structure."""

import copy
import re
import shlex
import tomllib
from subprocess import CompletedProcess

import pytest
import ray
import yaml
from commands import ROOT
from metadata_service import SCRIPT, notice
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

INFRA = ROOT / "infra"
AWS = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
CLUSTER = yaml.safe_load((INFRA / "kuberay" / "cluster.yaml").read_text())
JOB = yaml.safe_load((INFRA / "kuberay" / "job.yaml").read_text())
REDIS = list(yaml.safe_load_all((INFRA / "kuberay" / "redis.yaml").read_text()))
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()


def test_ray_takes_the_aws_file():
    prepared = prepare_config(copy.deepcopy(AWS))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.update(idle_timeout="5"),
        lambda file: file.update(head_node_type="leader"),
        lambda file: file["available_node_types"]["worker"].update(min_workers=9),
    ],
    ids=["unknown key", "no such head", "more than at most"],
)
def test_ray_refuses_it_when_it_is_spoilt(spoil):
    file = copy.deepcopy(AWS)
    spoil(file)
    with pytest.raises(Exception):  # noqa: B017, PT011  # of whatever kind Ray has for it
        validate_config(prepare_config(file))


def test_head_is_kept_and_workers_come_and_go():
    nodes = AWS["available_node_types"]
    head = nodes[AWS["head_node_type"]]
    workers = [node for name, node in nodes.items() if name != AWS["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["CPU"] == 0
    assert all(node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for node in workers)
    assert {node["min_workers"] for node in workers} == {0}
    assert len({node["node_config"]["InstanceType"] for node in workers}) == 2
    assert workers[0]["resources"] == workers[1]["resources"]
    assert 0 < AWS["idle_timeout_minutes"] <= 10
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def files():
    return [path for path in INFRA.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]


def test_everything_asks_for_the_token_and_no_file_holds_one():
    assert "--env RAY_AUTH_MODE=token" in AWS["docker"]["run_options"]
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    path = next(one.partition("=")[2] for one in AWS["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in one)
    assert path in AWS["file_mounts"]
    for role in ("head", "worker"):
        (start,) = [line for line in AWS[f"{role}_start_ray_commands"] if "ray start" in line]
        assert start.startswith("RAY_AUTH_MODE=token ray start")
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token", "secretName": "grainmill-token"}
    (submitter,) = JOB["spec"]["submitterPodTemplate"]["spec"]["containers"]
    given = {one["name"]: one for one in submitter["env"]}
    assert given["RAY_AUTH_MODE"]["value"] == "token"
    key = {"name": "grainmill-token", "key": "auth_token"}
    assert given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == key
    for path in files():
        assert not re.search(r"\b[0-9a-f]{32,}\b|kind: Secret", path.read_text()), path


def test_dashboard_is_reached_through_a_tunnel_alone():
    (start,) = [shlex.split(line) for line in AWS["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    # A group that Ray makes lets everybody try SSH.
    assert all(node["node_config"]["SecurityGroupIds"] for node in AWS["available_node_types"].values())
    assert "security_group" not in AWS["provider"]


def test_kubernetes_objects_have_what_the_operator_asks_for():
    assert {CLUSTER["apiVersion"], JOB["apiVersion"]} == {"ray.io/v1"}
    assert (CLUSTER["kind"], JOB["kind"]) == ("RayCluster", "RayJob")
    spec = CLUSTER["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive")
    assert isinstance(spec["autoscalerOptions"]["idleTimeoutSeconds"], int)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # as autoscaler v2 asks
        (container,) = pod["containers"]
        assert {one["name"] for one in container["volumeMounts"]} <= {one["name"] for one in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & {one["name"] for one in container["env"]}  # the operator's
    job = JOB["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert "rayClusterSpec" not in job
    assert "backoffLimit" not in job  # refused together with a selector
    assert job["shutdownAfterJobFinishes"] is False
    assert job["activeDeadlineSeconds"] > 0
    assert set(yaml.safe_load(job["runtimeEnvYAML"])) == {"env_vars"}


def test_what_the_head_knows_outlives_it():
    kept = CLUSTER["spec"]["gcsFaultToleranceOptions"]
    service, server = REDIS
    assert kept["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == server["spec"]["template"]["metadata"]["labels"]
    (redis,) = server["spec"]["template"]["spec"]["containers"]
    assert redis["env"][0]["valueFrom"] == kept["redisPassword"]["valueFrom"]
    assert "--appendonly yes" in redis["command"][-1]
    claims = {claim["metadata"]["name"] for claim in server["spec"]["volumeClaimTemplates"]}
    assert {one["name"] for one in redis["volumeMounts"]} == claims


def test_versions_and_images_are_the_same_everywhere():
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = re.search(r"^ray==(\S+)$", constraints, re.MULTILINE)[1]
    python = re.search(r"Python 3\.(\d+)", constraints)[1]
    assert pinned == ray.__version__
    assert f"ARG RAY={pinned}\n" in DOCKERFILE
    assert f"ARG PYTHON=py3{python}\n" in DOCKERFILE
    assert CLUSTER["spec"]["rayVersion"] == pinned
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = "".join(path.read_text() for path in files())
    assert set(re.findall(r"registry\.example/grainmill:(\S+)", text)) == {version}


def test_image_gets_what_the_package_is_built_from():
    copied = [
        word for line in re.findall(r"^COPY --chown=ray (.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {*project["tool"]["setuptools"]["packages"]["find"]["where"], project["project"]["readme"]} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    sent = {line[1:] for line in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert sent == set(copied)


def drained_by(words):
    """What Ray's own command makes of a line that drains the node."""
    assert words[:2] == ["ray", "drain-node"]
    return drain_node.make_context("drain-node", words[2:]).params


def test_node_that_goes_says_so_before_by_a_command_that_ray_understands(monkeypatch):
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    *_, line = container["lifecycle"]["preStop"]["exec"]["command"]
    drain, _, rest = line.partition(" && ")
    told = drained_by(shlex.split(drain))
    assert told["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert told["node_id"] is told["address"] is None  # the pod's own
    waits = int(re.fullmatch(r"sleep (\d+)", rest)[1])
    assert waits <= told["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]

    script = AWS["file_mounts"]["/home/ray/notice.py"]
    assert ROOT / script == SCRIPT
    *_, start, after = AWS["worker_start_ray_commands"]
    assert "ray start" in start
    assert re.search(r"flock --nonblock \S+ python ~/notice\.py .*&\)$", after)
    commands = []

    def run(words, check):
        commands.append(words)
        return CompletedProcess(words, 0)

    monkeypatch.setattr(notice.subprocess, "run", run)
    assert notice.drain(119)
    assert drained_by(commands[0])["deadline_remaining_seconds"] == 119
    assert drained_by(commands[0])["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
