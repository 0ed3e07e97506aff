"""Fixture: an experiment file of the toy."""

import os

import pytest
import yaml


@pytest.fixture
def gated_file(tmp_path):
    """An experiment file whose trials wait in their second epoch until a named pipe, the gate, is opened."""
    os.mkfifo(tmp_path / "gate")
    content = {
        "name": "cut-short",
        "trainable": "toy",
        "data": {"diary": str(tmp_path / "diary"), "gate": str(tmp_path / "gate")},
        "space": {"height": {"uniform": [0.0, 1.0]}},
        "objective": {"score": "max"},
        "search": {"trials": 3, "scheduler": "none"},
        "storage": str(tmp_path / "runs"),
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
