"""Optuna's samplers, which draw the settings of trials."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from grainmill.config.experiment import Experiment
from grainmill.config.space import Parameter, Scalar, Space

STARTUP_SHARE = 3
"""Every third trial, at most ten, is drawn at random before the sampler models the objective."""
POPULATION_SHARE = 5
"""Smallest number of generations of `nsga2` in a search."""


def build(experiment: Experiment, trials: int, given: int) -> optuna.samplers.BaseSampler:
    """Sampler for the next trial of a search of `trials` trials, of which `given` have been drawn.

    Each trial has its own random numbers, so that a search that is carried on draws the same settings as one that was
    not interrupted. Trials that were stopped early never count as complete: `gp` and `nsga2` learn from complete trials
    alone; `tpe` ranks stopped trials behind all complete ones, with one objective by the epoch that they reached.
    """
    search = experiment.search
    seed = int(np.random.SeedSequence((search.seed, given)).generate_state(1)[0])
    startup = min(10, max(1, trials // STARTUP_SHARE))
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        match search.sampler:
            case "tpe":
                # constant_liar: running trials count as poor, so that the next trial is drawn elsewhere.
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
            case "nsga2":
                size = min(50, max(4, trials // POPULATION_SHARE))
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=size)
            case "qmc":
                return optuna.samplers.QMCSampler(
                    seed=search.seed,  # of the whole sequence; the study keeps the place in it
                    scramble=True,
                    independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                    warn_asynchronous_seeding=False,
                    warn_independent_sampling=False,
                )
            case _:  # a grid draws nothing
                return optuna.samplers.RandomSampler(seed=seed)


def suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Scalar:
    """Value of a parameter that the sampler draws."""
    match distribution := _distribution(parameter):
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(name, distribution.low, distribution.high)
        case _:
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def adopted(trial: FrozenTrial, space: Space, attributes: Mapping[str, Any]) -> FrozenTrial:
    """Copy of a complete trial of another study, with the values that lie inside `space`."""
    setting = trial.user_attrs["setting"]
    inside = {
        name: _distribution(parameter)
        for name, parameter in space.items()
        if name in setting and parameter.contains(setting[name])
    }
    return optuna.trial.create_trial(
        params={name: setting[name] for name in inside},
        distributions=inside,
        values=trial.values,
        user_attrs={"history": trial.user_attrs.get("history", []), **attributes},
    )


def _distribution(parameter: Parameter) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    if parameter.choice:
        return CategoricalDistribution(parameter.choice)
    if parameter.integer:
        return IntDistribution(*parameter.integer)
    bounds = parameter.loguniform or parameter.uniform
    assert bounds, "a parameter has one kind"
    return FloatDistribution(*bounds, log=parameter.loguniform is not None)
