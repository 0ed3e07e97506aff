"""The nodes of infra/aws/cluster.yaml as Ray's launcher makes them, on moto's EC2 and IAM; nothing logs in anywhere."""

import os
import subprocess
import sys
import threading

import boto3
import pytest
from commands import ROOT
from launching import Launcher
from servers import free_port

from grainmill.config.yaml_document import read_plain

FILE = ROOT / "infra" / "aws" / "cluster.yaml"


@pytest.fixture
def ec2(tmp_path, monkeypatch):
    """A client of an EC2 on this machine, of which everything here knows, and no other."""
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "moto",
        "AWS_SECRET_ACCESS_KEY": "moto",
        "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(tmp_path),  # for the key pair that the launcher makes
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # In a process of its own: what moto knows of IAM is read once in each.
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("Running on" in line for line in server.stderr)
    reader = threading.Thread(target=server.stderr.read)  # or its pipe fills up
    reader.start()
    yield boto3.client("ec2")
    server.terminate()
    server.wait()
    reader.join()
    server.stderr.close()


def instances(ec2, state="running"):
    pages = ec2.describe_instances(Filters=[{"Name": "instance-state-name", "Values": [state]}])["Reservations"]
    return [one for page in pages for one in page["Instances"]]


def test_head_and_spot_workers_are_made_as_the_file_says_and_none_is_left(ec2):
    content = read_plain(FILE)
    group = own_group(ec2)
    for node in content["available_node_types"].values():
        node["node_config"]["SecurityGroupIds"] = [group]
    launcher = Launcher(content)
    launcher.create("head", "head", 1)
    launcher.create("worker", "worker", 2)
    launcher.create("worker-fallback", "worker", 1)
    made = {}
    for one in instances(ec2):
        tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
        made.setdefault(tags["ray-user-node-type"], []).append(one)
        assert tags["ray-cluster-name"] == "grainmill"
        assert tags["ray-node-type"] == ("head" if tags["ray-user-node-type"] == "head" else "worker")
    assert {name: len(nodes) for name, nodes in made.items()} == {"head": 1, "worker": 2, "worker-fallback": 1}
    types = {"head": "m6i.xlarge", "worker": "g5.4xlarge", "worker-fallback": "g6.4xlarge"}
    for name, nodes in made.items():
        for one in nodes:
            assert one["InstanceType"] == types[name]
            assert one.get("InstanceLifecycle") == (None if name == "head" else "spot")
            assert one["Placement"]["AvailabilityZone"] in {"us-west-2a", "us-west-2b", "us-west-2c"}
    assert {one["GroupId"] for nodes in made.values() for node in nodes for one in node["SecurityGroups"]} == {group}
    assert open_to_others(ec2, group) == [("tcp", 22, 22, ["203.0.113.0/24"])]
    assert len(launcher.there()) == 4
    launcher.terminate()
    assert launcher.there() == []
    assert len(instances(ec2, "terminated")) == 4
    assert instances(ec2) == []


def own_group(ec2):
    """The group of the runbook: the nodes among themselves, and SSH from one's own network."""
    (vpc,) = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    group = ec2.create_security_group(GroupName="grainmill", Description="nodes", VpcId=vpc["VpcId"])["GroupId"]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[among, ssh])
    return group


def open_to_others(ec2, group):
    """What may come in, except from the group itself."""
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    return [
        (rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), [one["CidrIp"] for one in rule["IpRanges"]])
        for rule in found["IpPermissions"]
        if [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] != [group]
    ]
