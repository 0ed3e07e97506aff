"""The names of `import multigrain`: a change to this list is a change for everybody who uses the method."""

import subprocess
import sys
from pathlib import Path

import pytest

import multigrain

ROOT = Path(__file__).parents[2]
PUBLIC = """
    AugmentSettings Dataset DataError EpochResult GeM JointLoss MarginLoss MultiGrain MultiGrainSpec
    RepeatedAugmentationBatches TrainTransform TrainingError Triplets Truth Whitening average_precision
    classification_loss colour decode entropy_loss evaluation_view fit gem load load_network load_weights
    margin_loss mean_average_precision micro_ap negative_weights pairs ranks read_dataset recall_at same_label
    sample_triplets
"""
TYPED = """
from pathlib import Path
from typing import assert_type

import torch

import multigrain
from multigrain import MultiGrain, Triplets, load_network, sample_triplets

network = MultiGrain("narrow", num_classes=10)
output = network(torch.rand(4, 3, 32, 32))
triplets = sample_triplets(torch.rand(4, 8), torch.tensor([0, 0, 1, 1]))
assert_type(triplets, Triplets)
assert_type(multigrain.gem(torch.rand(4, 8, 3, 3), 3.0), torch.Tensor)
assert_type(load_network(Path("run"))[1], multigrain.MultiGrainSpec)
"""


def test_the_public_names_are_these():
    assert sorted(multigrain.__all__) == sorted(PUBLIC.split())
    assert {*PUBLIC.split()} < {*dir(multigrain)}


@pytest.mark.parametrize("name", PUBLIC.split())
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    assert getattr(multigrain, name).__doc__


@pytest.mark.parametrize("name", ["Multigrain", "_Gather", "sampler"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'multigrain' has no attribute '{name}'"):
        getattr(multigrain, name)


def test_type_checkers_see_every_public_name_and_no_other(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(TYPED + "".join(f"multigrain.{name}\n" for name in [*PUBLIC.split(), "Multigrain"]))
    done = subprocess.run([sys.executable, "-m", "mypy", file], capture_output=True, text=True, cwd=ROOT, check=False)
    error, *others = [line for line in done.stdout.splitlines() if "error:" in line]
    assert f'user.py:{len(file.read_text().splitlines())}: error: Module has no attribute "Multigrain"' in error
    assert others == []
