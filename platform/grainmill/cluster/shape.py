"""Sizes that a cluster can reach, read from its file: that of Ray's launcher (`ray up`), or KubeRay's RayCluster."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grainmill.config.resources import Need
from grainmill.config.validation import error_messages
from grainmill.config.yaml_document import dotted, read_plain
from grainmill.errors import ExperimentError, Problem, ResourceError

MAX_NODES = 1000
"""Highest number of nodes of one type; replaces a missing or higher limit, such as KubeRay's default of 2147483647."""

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class NodeType:
    """Nodes of equal resources."""

    name: str
    resources: Mapping[str, float]
    max_nodes: int
    min_nodes: int = 0
    price: float | None = None
    """Price of one node in dollars an hour, if the file states it."""

    def holds(self, bundle: Mapping[str, float]) -> int:
        """Count the workers that fit on one node, each with the resources `bundle`."""
        return min(_multiples(self.resources.get(name, 0), amount) for name, amount in bundle.items())

    def __str__(self) -> str:
        shown = [f"{amount:g} {name}" for name, amount in self.resources.items() if name in ("CPU", "GPU")]
        return f"{self.name}: {', '.join(shown) or 'nothing'}"


@dataclass(frozen=True)
class Cluster:
    """A permanent head, and worker nodes that start on request."""

    head: NodeType
    worker_types: tuple[NodeType, ...]
    max_workers: int
    """Maximum number of worker nodes, of all types together."""
    idle_seconds: float
    """Time without work after which a worker node is removed."""

    def nodes_for(self, bundle: Mapping[str, float]) -> list[NodeType]:
        """List the type of every node that can hold such bundles at the same time, the head first.

        The order of worker types is Ray's: no GPU where none is requested, then the type with the least unused rest.
        """
        fitting = [one for one in self.worker_types if one.holds(bundle)]
        ranked = sorted(fitting, key=lambda one: _waste(one, bundle))
        workers = [one for one in ranked for _ in range(one.max_nodes)][: self.max_workers]
        return [self.head] * (self.head.holds(bundle) > 0) + workers

    def trials_that_fit(self, need: Need) -> int:
        """Count the trials that fit into the cluster at its full size; see the function `trials_that_fit`."""
        return trials_that_fit(self.nodes_for(need.bundle) or [self.head, *self.worker_types], need)


def _multiples(available: float, amount: float) -> int:
    """Count how often `amount`, above 0, is available. An amount below 1 must come from a single device."""
    unit = max(1, round(amount * 1e4))  # Ray counts in ten-thousandths
    return int(available) * (10_000 // unit) if amount < 1 <= available else round(available * 1e4) // unit


def _waste(node: NodeType, bundle: Mapping[str, float]) -> tuple[bool, float]:
    idle_gpu = node.resources.get("GPU", 0) > 0 and not bundle.get("GPU")
    used = [node.holds(bundle) * bundle.get(name, 0) / have for name, have in node.resources.items() if have >= 1]
    return idle_gpu, -min(used, default=0.0)


def trials_that_fit(nodes: Sequence[NodeType], need: Need) -> int:
    """Count the trials that fit on the nodes at the same time. Workers of one trial may be on several nodes.

    Raises:
        ResourceError: no trial fits; names what is missing and the nearest possible setting.
    """
    holds = [count for node in nodes if (count := node.holds(need.bundle))]
    needs = " and ".join(f"{amount:g} {name}" for name, amount in need.bundle.items())
    if not holds:
        raise ResourceError(f"one worker needs {needs}, but {_too_small(nodes, need.bundle)}")
    if (total := sum(holds)) < need.fewest:
        raise ResourceError(
            f"a trial needs {need.fewest} workers of {needs} each, but the cluster has room for {total} at most "
            f"({_listed(nodes)}); lower the workers to {total}"
        )
    if not need.one_per_node:
        return max(1, total // need.most)
    if len(holds) < need.fewest:
        raise ResourceError(
            f"with resources.placement spread, a trial needs a node for each of its {need.fewest} workers, but the "
            f"cluster has {len(holds)} that can hold one; lower the workers to {len(holds)}, or set placement to pack"
        )
    # With n trials at once, a node can hold at most n workers, one of each trial.
    fitting = (n for n in range(total // need.most, 0, -1) if sum(min(n, held) for held in holds) >= n * need.most)
    return next(fitting)


def _too_small(nodes: Iterable[NodeType], bundle: Mapping[str, float]) -> str:
    """Name the resources that the nearest node lacks, and the settings that would fit on it."""

    def share(node: NodeType) -> list[float]:
        return sorted(min(1.0, node.resources.get(name, 0) / amount) for name, amount in bundle.items())

    nearest = max(nodes, key=share, default=None)
    if nearest is None:
        return "the cluster has no nodes; start some"
    lacking = {
        name: nearest.resources.get(name, 0) for name, amount in bundle.items() if not nearest.holds({name: amount})
    }
    have = " and ".join(f"{amount:g} {name}" for name, amount in lacking.items())
    lower = ", ".join(f"{name.lower()}s_per_worker to {amount:g}" for name, amount in lacking.items())
    # A worker takes at least one CPU.
    fix = "use a cluster that has some" if lacking.get("CPU", 1) < 1 else f"lower {lower}"
    return f"no node type has more than {have} ({_listed(nodes)}); {fix}"


def _listed(nodes: Iterable[NodeType]) -> str:
    return "; ".join(dict.fromkeys(map(str, nodes)))


class _Part(BaseModel):
    """Part of a cluster file; keys that are not needed here are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _LauncherType(_Part):
    resources: dict[str, Amount] = Field(min_length=1)
    min_workers: Count = 0
    max_workers: Count | None = None


class _Provider(_Part):
    prices: dict[str, Amount] = {}


class _Launcher(_Part):
    """File for `ray up`. On some clouds it may omit `resources`, but then only the cloud knows them."""

    available_node_types: dict[str, _LauncherType] = Field(min_length=1)
    head_node_type: str
    max_workers: Count = 2
    idle_timeout_minutes: Amount = 5.0
    provider: _Provider

    @model_validator(mode="after")
    def _names(self) -> "_Launcher":
        known = self.available_node_types
        for name in (self.head_node_type, *self.provider.prices):
            if name not in known:
                raise ValueError(f"{name!r} is no node type of this file; known: {', '.join(known)}")
        return self

    def cluster(self) -> Cluster:
        def node_type(name: str, max_nodes: int | None = None) -> NodeType:
            one, price = self.available_node_types[name], self.provider.prices.get(name)
            limit = self.max_workers if one.max_workers is None else one.max_workers
            return NodeType(name, one.resources, limit if max_nodes is None else max_nodes, one.min_workers, price)

        workers = tuple(node_type(name) for name in self.available_node_types if name != self.head_node_type)
        return Cluster(node_type(self.head_node_type, 1), workers, self.max_workers, 60 * self.idle_timeout_minutes)


class _Container(_Part):
    resources: dict[str, dict[str, str | int | float]] = {}


class _PodSpec(_Part):
    containers: list[_Container] = Field(min_length=1)


class _Template(_Part):
    spec: _PodSpec


class _Group(_Part):
    groupName: str = "head"
    replicas: Count = 0
    minReplicas: Count = 0
    maxReplicas: Count = MAX_NODES
    rayStartParams: dict[str, str] = {}
    template: _Template

    def node_type(self, max_nodes: int, min_nodes: int) -> NodeType:
        """Resources as KubeRay passes them to Ray: the parameters of Ray's start, otherwise the limits of the pod."""
        container = self.template.spec.containers[0].resources
        pod = {**container.get("requests", {}), **container.get("limits", {})}
        resources = {"CPU": float(math.ceil(_quantity(pod.get("cpu", 0))))}
        if gpus := sum(_quantity(amount) for name, amount in pod.items() if name.endswith("gpu")):
            resources["GPU"] = gpus
        parameters = {"CPU": self.rayStartParams.get("num-cpus"), "GPU": self.rayStartParams.get("num-gpus")}
        resources |= {name: float(amount) for name, amount in parameters.items() if amount is not None}
        return NodeType(self.groupName, resources, max_nodes, min_nodes)


class _AutoscalerOptions(_Part):
    idleTimeoutSeconds: Amount = 60.0


class _RayClusterSpec(_Part):
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: _AutoscalerOptions = _AutoscalerOptions()
    headGroupSpec: _Group
    workerGroupSpecs: list[_Group] = []


class _RayCluster(_Part):
    """Object of the KubeRay operator."""

    kind: Literal["RayCluster"]
    spec: _RayClusterSpec

    def cluster(self) -> Cluster:
        grows, groups = self.spec.enableInTreeAutoscaling, self.spec.workerGroupSpecs
        types = tuple(
            one.node_type(min(one.maxReplicas, MAX_NODES), one.minReplicas)
            if grows
            else one.node_type(one.replicas, one.replicas)
            for one in groups
        )
        idle = self.spec.autoscalerOptions.idleTimeoutSeconds
        return Cluster(self.spec.headGroupSpec.node_type(1, 0), types, sum(one.max_nodes for one in types), idle)


def _quantity(text: str | float) -> float:
    """Convert a count as Kubernetes writes it, such as 2, "2" or "500m"."""
    found = re.fullmatch(r"([0-9.]+)(m?)", str(text))
    return float(found[1]) / (1000 if found[2] else 1) if found else 0.0


def read_cluster(file: Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ExperimentError: the file is wrong; has all problems.
    """
    return parse_cluster(str(file), read_plain(file))


def parse_cluster(name: str, tree: object) -> Cluster:
    """Convert the content of a cluster file, or an object of Kubernetes. `name` appears in error messages.

    Raises:
        ExperimentError: the content is wrong; has all problems.
    """
    model: type[_Launcher] | type[_RayCluster] = _RayCluster if isinstance(tree, dict) and "kind" in tree else _Launcher
    try:
        return model.model_validate(tree).cluster()
    except ValidationError as error:
        found = [Problem(None, dotted(place), message) for place, message in error_messages(model, error)]
        raise ExperimentError(name, found) from error
