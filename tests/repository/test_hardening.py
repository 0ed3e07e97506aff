"""The files of infra/: no container runs as root or without limits, and nothing is open that need not be."""

import re

import pytest
import yaml
from commands import ROOT

INFRA = ROOT / "infra"
DOCKERFILES = sorted(INFRA.rglob("*Dockerfile"))
MANIFESTS = [one for path in sorted((INFRA / "kuberay").glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
COMPOSE = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())
AWS = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())


def found(value, key):
    """All values of a key, at any depth."""
    if isinstance(value, dict):
        yield from [value[key]] if key in value else []
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from found(one, key)


PODS = [one for manifest in MANIFESTS for one in found(manifest, "spec") if "containers" in one]


def test_there_is_something_to_look_at():
    assert len(DOCKERFILES) == 3
    assert [pod["containers"][0]["name"] for pod in PODS] == ["ray-head", "ray-worker", "submitter", "redis"]
    assert set(COMPOSE["services"]) == {"mlflow", "postgres", "minio", "bucket"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_images_are_built_from_a_version_and_end_without_root(path):
    text = path.read_text()
    for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert re.search(r":[^:]*(\d+\.\d+|\$\{RAY\}|RELEASE\.\d)", image), image
    *_, user = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert user.partition(":")[0] not in ("root", "0")
    assert "USER" not in text.rpartition(f"USER {user}")[2]


def test_every_image_that_is_run_has_a_version():
    images = [*found(MANIFESTS, "image"), *found(COMPOSE, "image"), AWS["docker"]["image"]]
    assert len(images) == 7
    for image in images:
        assert re.search(r":(v?\d+\.\d+|RELEASE\.\d)", image), image


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_no_pod_runs_as_root_gains_rights_or_takes_a_whole_node(pod):
    user = pod["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["runAsUser"] > 0 < user["runAsGroup"]
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
    # The operator makes the head's account, for the autoscaler.
    head = pod["containers"][0]["name"] == "ray-head"
    assert pod.get("automountServiceAccountToken") is (None if head else False)
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & pod.keys()


def test_nothing_in_a_cluster_is_privileged_and_no_rights_are_given_by_hand():
    assert not list(found(MANIFESTS, "privileged"))
    assert not list(found(MANIFESTS, "hostPath"))
    assert {one["kind"] for one in MANIFESTS} == {"RayCluster", "RayJob", "NetworkPolicy", "Service", "StatefulSet"}
    assert not [service for service in found(MANIFESTS, "type") if service in ("LoadBalancer", "NodePort")]
    (autoscaler,) = found(MANIFESTS, "autoscalerOptions")
    assert autoscaler["securityContext"]["allowPrivilegeEscalation"] is False
    assert autoscaler["resources"]["limits"]


def admitted(policy):
    """(labels of those who may come in, ports); no port stands for all."""
    for rule in policy["spec"]["ingress"]:
        for one in rule["from"]:
            yield one["podSelector"]["matchLabels"], [port["port"] for port in rule.get("ports", [])]


def test_only_those_who_need_it_reach_the_pods():
    cluster, redis = (one for one in MANIFESTS if one["kind"] == "NetworkPolicy")
    name = {"ray.io/cluster": next(one for one in MANIFESTS if one["kind"] == "RayCluster")["metadata"]["name"]}
    (submitter,) = (
        labels["labels"]
        for labels in found(MANIFESTS, "metadata")
        if labels.get("labels", {}).get("app") == "grainmill-submitter"
    )
    server = next(one for one in MANIFESTS if one["kind"] == "StatefulSet")
    for policy in (cluster, redis):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert cluster["spec"]["podSelector"]["matchLabels"] == name
    assert [*admitted(cluster)] == [
        (name, []),
        (submitter, [8265, 8000]),
        ({"app.kubernetes.io/name": "kuberay-operator"}, [8265, 8000]),
    ]
    assert redis["spec"]["podSelector"]["matchLabels"] == server["spec"]["template"]["metadata"]["labels"]
    for labels, ports in admitted(redis):
        assert labels.items() > name.items()
        assert labels["ray.io/node-type"] in ("head", "redis-cleanup")
        assert ports == [6379]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_no_service_runs_as_root_gains_rights_or_takes_the_whole_machine(name):
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & service.keys()
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))
    if "image" in service:  # what is built here has its user in the Dockerfile
        assert int(service["user"].partition(":")[0]) > 0


def test_the_database_and_the_store_are_reached_by_the_server_alone():
    assert COMPOSE["networks"] == {"front": None, "back": {"internal": True}}
    networks = {name: service["networks"] for name, service in COMPOSE["services"].items()}
    assert networks.pop("mlflow") == ["front", "back"]
    assert set(map(tuple, networks.values())) == {("back",)}


def test_no_password_has_a_default():
    for path in (path for path in INFRA.rglob("*") if path.is_file() and path.parent.name != "__pycache__"):
        for name in re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY|TOKEN)\w*):?-", path.read_text()):
            pytest.fail(f"{path}: {name} has a default")
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|_USER|_KEY", name) and name not in ("POSTGRES_USER",):
                assert re.fullmatch(r"\$\{\w+:\?\}", value), name


def test_nodes_of_aws_ask_for_a_token_before_they_tell_their_role():
    for node in AWS["available_node_types"].values():
        options = node["node_config"]["MetadataOptions"]
        assert options == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"}
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
    assert "FullAccess" not in (INFRA / "README.md").read_text()
