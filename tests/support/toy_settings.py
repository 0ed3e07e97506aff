"""Experiments of the toy, and a model card."""

import toy

from grainmill.config.experiment import experiment_model
from grainmill.registry.model_card import Interval, ModelCard

HEIGHTS = {"height": {"uniform": [0.0, 1.0]}}


def experiment(**changes):
    content = {"name": "toy", "trainable": "toy", "data": {}, "space": HEIGHTS, "objective": {"score": "max"}}
    return experiment_model(toy).model_validate({**content, **changes})


CARD = ModelCard("toy", "name: apples\n", {}, toy.sources(toy.Data()), {}, {}, {}, {"score": Interval(0.25)})
