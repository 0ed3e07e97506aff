"""The trunk's first weights: the published ones, or those of a file. No code in a file is ever run."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigrain.config.training import TIMM, ModelSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch is imported when there are weights to look at, not when an experiment file is checked.

OWN = "network.trunk."
"""What the trunk's keys begin with in a checkpoint's `model.safetensors`."""
COUNTER = "num_batches_tracked"
"""Steps that batch normalisation has seen. Nothing here reads it, and older files lack it."""
SHOWN = 20
"""Keys that an error names."""


def _safetensors(path: Path, device: str) -> dict[str, "Tensor"]:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt", device="cpu") as file:
        if device == "meta":
            return {key: torch.empty(file.get_slice(key).get_shape(), device=device) for key in file.keys()}  # noqa: SIM118
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _state_dict(path: Path, device: str) -> dict[str, "Tensor"]:
    import torch

    problem = (
        f"model.weights must be safetensors or a state dict that torch loads without running code, but {path} is "
        "neither; save the tensors alone"
    )
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no pickle, or a broken or hostile one, fails in its own way
        raise ValueError(problem) from error
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(problem)
    return tensors


def _contents(path: Path, device: str) -> dict[str, "Tensor"]:
    """The tensors of a file; on the device `meta`, their shapes alone.

    Raises:
        ValueError: it cannot be read, is no file of tensors, or needs code to run.
    """
    from safetensors import SafetensorError

    try:
        return _safetensors(path, device) if path.suffix == ".safetensors" else _state_dict(path, device)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.weights must be random, zoo or a file that can be read, but {path} cannot ({error}); "
            "correct the path, or save the file again"
        ) from error


def _zoo_problem(trunk_name: str) -> str | None:
    if trunk_name.startswith(TIMM):
        import timm

        published = timm.is_model_pretrained(trunk_name.removeprefix(TIMM))
    else:
        published = trunk_name != "narrow"
    if published:
        return None
    return (
        f"model.weights can be zoo where weights are published, but {trunk_name} has none; set it to random or a file"
    )


def _published(trunk_name: str) -> dict[str, "Tensor"]:
    """The published classifier's state dict; downloaded, unless it is in the library's cache."""
    import torchvision

    if problem := _zoo_problem(trunk_name):
        raise ValueError(problem)
    try:
        if trunk_name.startswith(TIMM):
            import timm

            # With its classifier: timm passes over keys that differ where the classifier does.
            return timm.create_model(trunk_name.removeprefix(TIMM), pretrained=True).state_dict()
        weights = torchvision.models.get_model_weights(trunk_name)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.weights can be zoo where the published weights can be had, but those of {trunk_name} cannot "
            f"({error}); try again or name a file"
        ) from error


def _of_trunk(found: Mapping[str, "Tensor"], trunk_name: str) -> dict[str, "Tensor"]:
    """What counts for the trunk: without the classifier, or the trunk's part of our own checkpoint."""
    found = {key.removeprefix("module."): tensor for key, tensor in found.items()}
    if own := {key.removeprefix(OWN): tensor for key, tensor in found.items() if key.startswith(OWN)}:
        return own
    classifier: str | tuple[str, ...] = "fc"
    if trunk_name.startswith(TIMM):
        import timm

        classifier = timm.get_pretrained_cfg(trunk_name.removeprefix(TIMM)).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    prefixes = tuple(f"{name}." for name in names)
    return {key: tensor for key, tensor in found.items() if not key.startswith(prefixes)}


def _misfit(found: Mapping[str, "Tensor"], trunk: "nn.Module", trunk_name: str, source: str) -> str | None:
    """Every key of `found` that does not fit, in one message."""
    wanted = trunk.state_dict()
    wrong = [f"{key} is missing" for key in wanted if key not in found and not key.endswith(COUNTER)]
    for key, tensor in found.items():
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
    """Give a trunk its first weights.

    Args:
        trunk: `build_trunk(trunk_name).module`.
        trunk_name: of the trunk.
        source: `random` leaves the trunk as it is; `zoo` takes the published ImageNet weights, in torchvision
            IMAGENET1K_V1; else a file: safetensors, or a state dict of `torch.save`, also below `state_dict` or
            `model`, of torchvision's or timm's network or of a checkpoint of ours.
    Raises:
        ValueError: the source cannot be had, or does not fit; all keys that do not are named.
    """
    if source == "random":
        return
    found = _of_trunk(_published(trunk_name) if source == "zoo" else _contents(Path(source), "cpu"), trunk_name)
    if problem := _misfit(found, trunk, trunk_name, source):
        raise ValueError(problem)
    trunk.load_state_dict(found, strict=False)  # only counters are missing


def weight_problems(settings: ModelSettings) -> list[str]:
    """What keeps a network from getting its first weights, in words; empty if nothing does.

    Shapes are compared, nothing is downloaded, and no tensor of a safetensors file is read.
    """
    path = Path(settings.weights)
    found = path.stat() if path.exists() else None
    return list(_problems(settings, (found.st_mtime_ns, found.st_size) if found else None))


@lru_cache(maxsize=64)  # the many settings of a search space mostly share one network
def _problems(settings: ModelSettings, _file: tuple[int, int] | None) -> tuple[str, ...]:
    problems = []
    if settings.batchnorm == "frozen" and settings.weights == "random":
        problems.append(
            "model.weights must bring the statistics where model.batchnorm is frozen, but it is random; set it to zoo "
            "or a file, or model.batchnorm to local"
        )
    if settings.weights == "random" and not settings.trunk.startswith(TIMM):
        return tuple(problems)
    import torch

    from multigrain.models.multigrain import build_trunk

    try:
        with torch.device("meta"):
            trunk = build_trunk(settings.trunk).module
        if settings.weights == "zoo":
            problem = _zoo_problem(settings.trunk)
        elif settings.weights != "random":
            found = _of_trunk(_contents(Path(settings.weights), "meta"), settings.trunk)
            problem = _misfit(found, trunk, settings.trunk, settings.weights)
        else:
            problem = None
    except ValueError as error:
        problem = str(error)
    return (*problems, problem) if problem else tuple(problems)
