"""Initial weights of the trunk: published ones, or those of a file, in which no code is ever run."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigrain.config.training import TIMM, ModelSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch is imported when there are weights to read, not when an experiment file is checked.

OWN = "network.trunk."
"""Prefix of the trunk's keys in a checkpoint's `model.safetensors`."""
COUNTER = "num_batches_tracked"
"""Suffix of the step counters of batch normalisation, which are not used, and which older files lack."""
SHOWN = 20
"""Largest number of keys that an error names."""


def _state_dict(path: Path, device: str) -> dict[str, "Tensor"]:
    import torch

    content: Any = None
    cause: Exception | None = None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # files that are no pickle, broken or hostile raise errors of many types
        cause = error
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(
            f"model.weights must be safetensors or a state dict that torch loads without running code, but {path} is "
            "neither; save the tensors alone"
        ) from cause
    return tensors


def _contents(path: Path, device: str) -> dict[str, "Tensor"]:
    """The tensors of a file; on the device `meta` their shapes alone.

    Raises:
        ValueError: the file cannot be read, holds no tensors, or needs code to run.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix != ".safetensors":
            return _state_dict(path, device)
        with safe_open(path, "pt", device="cpu") as file:
            keys = list(file.keys())
            if device == "meta":
                return {key: torch.empty(file.get_slice(key).get_shape(), device=device) for key in keys}
            return {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.weights must be random, zoo or a file that can be read, but {path} cannot ({error}); "
            "correct the path, or save the file again"
        ) from error


def _zoo_problem(trunk_name: str) -> str | None:
    published = trunk_name != "narrow"
    if trunk_name.startswith(TIMM):
        import timm

        published = timm.is_model_pretrained(trunk_name.removeprefix(TIMM))
    if published:
        return None
    return (
        f"model.weights can be zoo where weights are published, but {trunk_name} has none; set it to random or a file"
    )


def _published(trunk_name: str) -> dict[str, "Tensor"]:
    """The state dict of the published classifier, from the library's cache or downloaded."""
    import torchvision

    if problem := _zoo_problem(trunk_name):
        raise ValueError(problem)
    try:
        if trunk_name.startswith(TIMM):
            import timm

            # With its classifier: without it, timm would ignore other keys that differ.
            return timm.create_model(trunk_name.removeprefix(TIMM), pretrained=True).state_dict()
        weights = torchvision.models.get_model_weights(trunk_name)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.weights can be zoo where the published weights can be had, but those of {trunk_name} cannot "
            f"({error}); try again or name a file"
        ) from error


def _of_trunk(tensors: Mapping[str, "Tensor"], trunk_name: str) -> dict[str, "Tensor"]:
    """The trunk's tensors among those of a classifier, or of a checkpoint of this package."""
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if own := {key.removeprefix(OWN): tensor for key, tensor in tensors.items() if key.startswith(OWN)}:
        return own
    classifier: str | tuple[str, ...] = "fc"
    if trunk_name.startswith(TIMM):
        import timm

        classifier = timm.get_pretrained_cfg(trunk_name.removeprefix(TIMM)).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    prefixes = tuple(f"{name}." for name in names)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}


def _misfit(tensors: Mapping[str, "Tensor"], trunk: "nn.Module", trunk_name: str, source: str) -> str | None:
    """Message that names all keys that do not fit the trunk, or None."""
    wanted = trunk.state_dict()
    wrong = [f"{key} is missing" for key in wanted if key not in tensors and not key.endswith(COUNTER)]
    for key, tensor in tensors.items():
        if key not in wanted:
            wrong.append(f"{key} is unexpected")
        elif tensor.shape != wanted[key].shape:
            wrong.append(f"{key} is {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}")
    if not wrong:
        return None
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return (
        f"model.weights must fit the trunk {trunk_name}, but in {source} {', '.join(wrong[:SHOWN])}{more}; "
        "name the weights of this trunk"
    )


def load_weights(trunk: "nn.Module", trunk_name: str, source: str) -> None:
    """Load the initial weights of a trunk.

    Args:
        trunk: `build_trunk(trunk_name).module`.
        trunk_name: name of the trunk.
        source: `random` leaves the trunk as it is. `zoo` loads the published ImageNet weights, IMAGENET1K_V1 for
            torchvision. Otherwise a file: safetensors, or a state dict of `torch.save`, possibly under the key
            `state_dict` or `model`; of a network of torchvision or timm, or of a checkpoint of this package.
    Raises:
        ValueError: the weights cannot be loaded, or do not fit; the message names all keys that do not.
    """
    if source == "random":
        return
    tensors = _of_trunk(_published(trunk_name) if source == "zoo" else _contents(Path(source), "cpu"), trunk_name)
    if problem := _misfit(tensors, trunk, trunk_name, source):
        raise ValueError(problem)
    trunk.load_state_dict(tensors, strict=False)  # only counters can be missing


def weight_problems(settings: ModelSettings) -> list[str]:
    """Return messages on what keeps a network from getting its initial weights; empty if nothing does.

    Shapes are compared. Nothing is downloaded, and no tensor of a safetensors file is read.
    """
    path = Path(settings.weights)
    file = path.stat() if path.exists() else None
    return list(_problems(settings, (file.st_mtime_ns, file.st_size) if file else None))


@lru_cache(maxsize=64)  # most settings of a search space share one network
def _problems(settings: ModelSettings, _file: tuple[int, int] | None) -> tuple[str, ...]:
    problems: list[str | None] = []
    if settings.batchnorm == "frozen" and settings.weights == "random":
        problems.append(
            "model.weights must bring the statistics where model.batchnorm is frozen, but it is random; set it to zoo "
            "or a file, or model.batchnorm to local"
        )
    try:
        problems.append(_fit_problem(settings))
    except ValueError as error:
        problems.append(str(error))
    return tuple(filter(None, problems))


def _fit_problem(settings: ModelSettings) -> str | None:
    name, source = settings.trunk, settings.weights
    if source == "random" and not name.startswith(TIMM):
        return None
    import torch

    from multigrain.models.multigrain import build_trunk

    with torch.device("meta"):
        trunk = build_trunk(name).module  # refuses networks of timm that give no map
    if source == "random":
        return None
    return (
        _zoo_problem(name)
        if source == "zoo"
        else _misfit(_of_trunk(_contents(Path(source), "meta"), name), trunk, name, source)
    )
