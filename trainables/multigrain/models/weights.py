"""Initial weights of the trunk: published ones, or those of a file, in which no code is ever run."""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multigrain.config.training import TIMM, ModelSettings
from multigrain.models.published import published_weights, zoo_problem

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
    """The tensors of a file of `torch.save`."""
    import torch

    content: Any = None
    cause: Exception | None = None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # files that are no pickle, broken or hostile raise errors of many types
        cause = error
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(cause))
        kind = f"holds an object of {found[1]}, such as a whole network" if found else "is neither"
        if isinstance(cause, EOFError) or "unexpected EOF" in str(cause):
            kind = "was cut short"
        raise ValueError(
            "model.weights must be safetensors or a state dict that torch loads without running code, but "
            f"{path} {kind}; save the tensors alone: torch.save(network.state_dict(), FILE)"
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
        if fault := _fault(path):
            raise ValueError(f"model.weights must be a file of weights, but {path} {fault}")
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


def _fault(path: Path) -> str | None:
    """A clause on what is often in the place of weights: a web page, a pointer to a file, or a part of one."""
    with path.open("rb") as file:
        start, size = file.read(200), file.seek(0, 2)
    again = "download or copy it again"
    if not start:
        return f"is empty; {again}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"is a web page, such as of an error or a login; {again}"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS; run `git lfs pull` beside it"
    header = 8 + int.from_bytes(start[:8], "little")
    if (start.startswith(b"PK") and not zipfile.is_zipfile(path)) or (start[8:9] == b"{" and size < header):
        return f"was cut short; {again}"
    return None


def _fitting(tensors: Mapping[str, "Tensor"], trunk: "nn.Module", trunk_name: str, source: str) -> dict[str, "Tensor"]:
    """The tensors that fit a trunk, among those of a classifier or another network that has the trunk as a part.

    Keys may have a prefix, such as `module.`; a warning names it.

    Raises:
        ValueError: no part fits, or several do.
    """
    wanted = trunk.state_dict()
    # A wanted key is the end of a longer one: what precedes it is a prefix.
    prefixes = Counter(
        key[:start]
        for key in tensors
        for start in (0, *(index + 1 for index, letter in enumerate(key) if letter == "."))
        if key[start:] in wanted
    )
    ordered = [OWN] if OWN in prefixes else [prefix for prefix, _ in prefixes.most_common(SHOWN)] or [""]
    parts = {prefix: _part(tensors, prefix, trunk_name) for prefix in ordered}
    wrong = {prefix: _differences(part, wanted) for prefix, part in parts.items()}
    fitting = [prefix for prefix in ordered if not wrong[prefix]]
    if len(fitting) > 1:
        raise ValueError(
            f"model.weights must fit the trunk {trunk_name} in one way, but in {source} several parts do, with the "
            f"prefixes {', '.join(map(repr, fitting))}; save one of them alone"
        )
    if not fitting:
        best = ordered[0]
        more = f", and {len(wrong[best]) - SHOWN} more" if len(wrong[best]) > SHOWN else ""
        named = f" without the prefix {best!r}" if best else ""
        raise ValueError(
            f"model.weights must fit the trunk {trunk_name}, but in {source}{named} "
            f"{', '.join(wrong[best][:SHOWN])}{more}; name the weights of this trunk"
        )
    if fitting[0] not in ("", OWN):
        warnings.warn(f"model.weights: the prefix {fitting[0]!r} of the keys in {source} is left out", stacklevel=3)
    return parts[fitting[0]]


def _part(tensors: Mapping[str, "Tensor"], prefix: str, trunk_name: str) -> dict[str, "Tensor"]:
    """The tensors with a prefix, by their keys without it, except for those of the classifier."""
    classifier: str | tuple[str, ...] = "fc"
    if trunk_name.startswith(TIMM):
        import timm

        classifier = timm.get_pretrained_cfg(trunk_name.removeprefix(TIMM)).classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    left_out = tuple(f"{prefix}{name}." for name in names)
    keys = (key for key in tensors if key.startswith(prefix) and not key.startswith(left_out))
    return {key.removeprefix(prefix): tensors[key] for key in keys}


def _differences(tensors: Mapping[str, "Tensor"], wanted: Mapping[str, "Tensor"]) -> list[str]:
    """A clause for each key that does not fit."""
    wrong = [f"{key} is missing" for key in wanted if key not in tensors and not key.endswith(COUNTER)]
    for key, tensor in tensors.items():
        if key not in wanted:
            wrong.append(f"{key} is unexpected")
        elif tensor.shape != wanted[key].shape:
            wrong.append(f"{key} is {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}")
    return wrong


def load_weights(trunk: "nn.Module", trunk_name: str, source: str) -> None:
    """Load the initial weights of a trunk.

    Args:
        trunk: `build_trunk(trunk_name).module`.
        trunk_name: name of the trunk.
        source: `random` leaves the trunk as it is. `zoo` loads the published ImageNet weights, IMAGENET1K_V1 for
            torchvision. Otherwise a file: safetensors, or a state dict of `torch.save`, possibly under the key
            `state_dict` or `model`; of a network of torchvision or timm, possibly as a part of another network, or of
            a checkpoint of this package.
    Raises:
        ValueError: the weights cannot be loaded, or do not fit; the message names all keys that do not.
    """
    if source == "random":
        return
    tensors = published_weights(trunk_name) if source == "zoo" else _contents(Path(source), "cpu")
    trunk.load_state_dict(_fitting(tensors, trunk, trunk_name, source), strict=False)  # only counters can be missing


def weight_problems(settings: ModelSettings) -> list[tuple[str, str]]:
    """Return what keeps a network from getting its initial weights: the setting at fault, and a sentence on it.

    Shapes are compared. Nothing is downloaded, and no tensor of a safetensors file is read.
    """
    path = Path(settings.weights)
    file = path.stat() if path.exists() else None
    messages = _problems(settings, (file.st_mtime_ns, file.st_size) if file else None)
    return [(key, rule) for key, _, rule in (message.partition(" ") for message in messages)]


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
    if source == "zoo":
        return zoo_problem(name)
    _fitting(_contents(Path(source), "meta"), trunk, name, source)
    return None
