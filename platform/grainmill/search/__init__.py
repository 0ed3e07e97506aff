"""Hyperparameter search: what it tries, what it records, and how it chooses.

`study` keeps the trials in an Optuna study, `records` is how others see a trial, `samplers` draw settings, `asha` stops
trials early, `pareto` orders points of several objectives, `selection` chooses the winner.
"""
