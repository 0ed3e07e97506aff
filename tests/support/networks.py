"""Small networks with their settings and checkpoints, and reference computations for comparison."""

import torch
from torch import nn

from multigrain.config.training import MultiGrainSpec
from multigrain.models import checkpoint, multigrain
from multigrain.models.checkpoint import Checkpoint
from multigrain.models.multigrain import MultiGrain
from multigrain.models.whitening import Whitening

FILES = ["MANIFEST.json", "model.safetensors", "optimizer.pt", "state.json"]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


EPOCHS, STEPS = 2, 3


def merged(settings, changes):
    for group, values in changes.items():
        settings[group] = {**settings.get(group, {}), **values} if isinstance(values, dict) else values
    return settings


def spec(**changes):
    """Settings of a training with three steps of 24 views an epoch, on 26 images, and a checkpoint after each step."""
    settings = {
        "image_size": 32,
        "epochs": EPOCHS,
        "model": {"trunk": "narrow"},
        "batch": {"size": 24, "repeats": 2, "length_factor": 2.5},
        "augment": {"crop": 0.5},
        "optimizer": {"rate": 1.0},
        "compute": {"checkpoint_steps": 1, "precision": "fp32"},
    }
    return MultiGrainSpec.model_validate(merged(settings, changes))


CLASSES = ["ant", "bee", "cat"]


SETTINGS = {"image_size": 32, "model": {"trunk": "narrow", "p": 2.5}}


def made(seed):
    """Return a network with random weights whose BatchNorm layers have statistics of random images."""
    torch.manual_seed(seed)
    network = MultiGrain("narrow", 3, 2.5)
    network.train()(torch.rand(8, 3, 32, 32))
    torch.nn.init.normal_(network.classifier.weight)
    return network.eval()


def save(folder, steps, settings=SETTINGS, **networks):
    """Save a checkpoint as training does."""
    model = {f"{prefix}.{name}": x for prefix, made in networks.items() for name, x in made.state_dict().items()}
    spec = MultiGrainSpec.model_validate(settings)
    state = {"steps": steps, "spec": spec.model_dump(), "classes": CLASSES}
    checkpoint.save(folder, Checkpoint(model | {"margin.beta": torch.tensor(1.2)}, {}, state))


def whitening_of(dimension=20):
    rng = torch.Generator().manual_seed(5)
    return Whitening.fit(torch.rand(300, 128, generator=rng), dimension)


def slow_average_precision(scores, positive):
    # Of equal scores the negatives come first.
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], positive[item]))
    found, total = 0, 0.0
    for rank, item in enumerate(order):
        if positive[item]:
            total += (found / rank if rank else 1.0) / 2 + (found + 1) / (rank + 1) / 2
            found += 1
    return total / found


def with_dropout(patch):
    """Give the trunk of every new network a dropout layer, which draws random numbers. `patch` is a `monkeypatch`."""
    build = multigrain.build_trunk

    def dropping(name):
        trunk = build(name)
        return trunk._replace(module=nn.Sequential(*trunk.module, nn.Dropout2d(0.3)))

    patch.setattr(multigrain, "build_trunk", dropping)
