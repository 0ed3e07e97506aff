"""What a cluster can become, by its file: that of Ray's launcher (`ray up`), or KubeRay's RayCluster."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grainmill.config.resources import Need
from grainmill.config.validation import error_messages
from grainmill.config.yaml_document import dotted, read_plain
from grainmill.errors import ExperimentError, Problem, ResourceError

NODES = 1000
"""Of a type where the file has no limit, or one beyond that: KubeRay's own default is 2147483647."""

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike."""

    name: str
    resources: Mapping[str, float]
    max_nodes: int
    """Nodes of it at a time."""
    min_nodes: int = 0
    price: float | None = None
    """Dollars an hour of one node, if the file tells."""

    def holds(self, bundle: Mapping[str, float]) -> int:
        """How many workers, each of which takes `bundle`, one node has room for."""
        return min(_times(self.resources.get(name, 0), amount) for name, amount in bundle.items())

    def __str__(self) -> str:
        shown = [f"{amount:g} {name}" for name, amount in self.resources.items() if name in ("CPU", "GPU")]
        return f"{self.name}: {', '.join(shown) or 'nothing'}"


@dataclass(frozen=True)
class Cluster:
    """A head that is always there, and nodes that come when they are asked for."""

    head: NodeType
    worker_types: tuple[NodeType, ...]
    max_workers: int
    """Nodes besides the head, of all types together."""
    idle_seconds: float
    """For which a node has no work before it goes."""

    def nodes_for(self, bundle: Mapping[str, float]) -> list[NodeType]:
        """The type of each node that can work at once on bundles like this one, the head first.

        Ray prefers types without GPUs where none is asked for, then those of which the bundles leave least; as we do.
        """
        fitting = [one for one in self.worker_types if one.holds(bundle)]
        ranked = sorted(fitting, key=lambda one: _waste(one, bundle))
        workers = [one for one in ranked for _ in range(one.max_nodes)][: self.max_workers]
        return [self.head] * (self.head.holds(bundle) > 0) + workers

    def trials_that_fit(self, need: Need) -> int:
        """`room` when it has grown."""
        return trials_that_fit(self.nodes_for(need.bundle) or [self.head, *self.worker_types], need)


def _times(have: float, amount: float) -> int:
    """How often an amount above 0 can be had; what is less than one is of one device."""
    unit = max(1, round(amount * 1e4))  # in ten-thousandths, as Ray counts
    return int(have) * (10_000 // unit) if amount < 1 <= have else round(have * 1e4) // unit


def _waste(node: NodeType, bundle: Mapping[str, float]) -> tuple[bool, float]:
    idle_gpu = node.resources.get("GPU", 0) > 0 and not bundle.get("GPU")
    used = [node.holds(bundle) * bundle.get(name, 0) / have for name, have in node.resources.items() if have >= 1]
    return idle_gpu, -min(used, default=0.0)


def trials_that_fit(nodes: Sequence[NodeType], need: Need) -> int:
    """How many trials nodes hold at once; the workers of one may be spread over several nodes.

    Args:
        nodes: the type of each that is there, or can be.
        need: of each trial.
    Raises:
        ResourceError: not one; says what is missing, and the nearest that is possible.
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
    if not need.apart:
        return max(1, total // need.most)
    if len(holds) < need.fewest:
        raise ResourceError(
            f"with resources.placement spread, a trial needs a node for each of its {need.fewest} workers, but the "
            f"cluster has {len(holds)} that can hold one; lower the workers to {len(holds)}, or set placement to pack"
        )
    # Of so many trials, a node can hold one worker of each.
    fitting = (n for n in range(total // need.most, 0, -1) if sum(min(n, held) for held in holds) >= n * need.most)
    return next(fitting)


def _too_small(nodes: Iterable[NodeType], bundle: Mapping[str, float]) -> str:
    """What the nearest node lacks, and what would fit."""

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
    # A worker takes one CPU at least.
    fix = "use a cluster that has some" if lacking.get("CPU", 1) < 1 else f"lower {lower}"
    return f"no node type has more than {have} ({_listed(nodes)}); {fix}"


def _listed(nodes: Iterable[NodeType]) -> str:
    return "; ".join(dict.fromkeys(map(str, nodes)))


class _Part(BaseModel):
    """What is read of a file that has more in it."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _LauncherType(_Part):
    resources: dict[str, Amount] = Field(min_length=1)
    min_workers: Count = 0
    max_workers: Count | None = None


class _Provider(_Part):
    prices: dict[str, Amount] = {}


class _Launcher(_Part):
    """A file for `ray up`. `resources` may be left out there on some clouds, but only the cloud knows them then."""

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
        def made(name: str, most: int | None = None) -> NodeType:
            one = self.available_node_types[name]
            limit = self.max_workers if one.max_workers is None else one.max_workers
            price = self.provider.prices.get(name)
            return NodeType(name, one.resources, limit if most is None else most, one.min_workers, price)

        workers = tuple(made(name) for name in self.available_node_types if name != self.head_node_type)
        return Cluster(made(self.head_node_type, 1), workers, self.max_workers, 60 * self.idle_timeout_minutes)


class _Container(_Part):
    resources: dict[str, dict[str, str | int | float]] = {}


class _PodSpec(_Part):
    containers: list[_Container] = Field(min_length=1)


class _Template(_Part):
    spec: _PodSpec


class _Group(_Part):
    groupName: str = "head"  # noqa: N815  # Kubernetes writes it so, and what follows
    replicas: Count = 0
    minReplicas: Count = 0  # noqa: N815
    maxReplicas: Count = NODES  # noqa: N815
    rayStartParams: dict[str, str] = {}  # noqa: N815
    template: _Template

    def made(self, most: int, least: int) -> NodeType:
        """Its resources as KubeRay gives them to Ray: what Ray is told at the start, else the pod's limits."""
        asked = self.template.spec.containers[0].resources
        pod = {**asked.get("requests", {}), **asked.get("limits", {})}
        resources = {"CPU": float(math.ceil(_quantity(pod.get("cpu", 0))))}
        if gpus := sum(_quantity(amount) for name, amount in pod.items() if name.endswith("gpu")):
            resources["GPU"] = gpus
        told = {"CPU": self.rayStartParams.get("num-cpus"), "GPU": self.rayStartParams.get("num-gpus")}
        resources |= {name: float(amount) for name, amount in told.items() if amount is not None}
        return NodeType(self.groupName, resources, most, least)


class _AutoscalerOptions(_Part):
    idleTimeoutSeconds: Amount = 60.0  # noqa: N815


class _RayClusterSpec(_Part):
    enableInTreeAutoscaling: bool = False  # noqa: N815
    autoscalerOptions: _AutoscalerOptions = _AutoscalerOptions()  # noqa: N815
    headGroupSpec: _Group  # noqa: N815
    workerGroupSpecs: list[_Group] = []  # noqa: N815


class _RayCluster(_Part):
    """An object of the KubeRay operator."""

    kind: Literal["RayCluster"]
    spec: _RayClusterSpec

    def cluster(self) -> Cluster:
        types = tuple(
            group.made(min(group.maxReplicas, NODES), group.minReplicas)
            if self.spec.enableInTreeAutoscaling
            else group.made(group.replicas, group.replicas)
            for group in self.spec.workerGroupSpecs
        )
        idle = self.spec.autoscalerOptions.idleTimeoutSeconds
        return Cluster(self.spec.headGroupSpec.made(1, 0), types, sum(one.max_nodes for one in types), idle)


def _quantity(text: str | float) -> float:
    """A count as Kubernetes writes it: 2, "2", "500m"."""
    found = re.fullmatch(r"([0-9.]+)(m?)", str(text))
    return float(found[1]) / (1000 if found[2] else 1) if found else 0.0


def read_cluster(file: Path) -> Cluster:
    """What a cluster file says.

    Raises:
        ExperimentError: with all problems found.
    """
    return parse_cluster(str(file), read_plain(file))


def parse_cluster(name: str, tree: object) -> Cluster:
    """What the content of a cluster file says, or the object that Kubernetes made of it; `name` is for errors.

    Raises:
        ExperimentError: with all problems found.
    """
    model: type[_Launcher] | type[_RayCluster] = _RayCluster if isinstance(tree, dict) and "kind" in tree else _Launcher
    try:
        return model.model_validate(tree).cluster()
    except ValidationError as error:
        raise ExperimentError(name, list(_problems(model, error))) from error


def _problems(model: type[BaseModel], error: ValidationError) -> Iterator[Problem]:
    for location, message in error_messages(model, error):
        yield Problem(None, dotted(location), message)
