"""Trials of a study on Ray: Tune runs them, each alone in its process or as a group of Ray Train workers.

In the driver, `runner` starts the trials, `searcher` chooses them and `trial_callback` records them. In a trial's
process, `trial` trains, or leads a `worker_group` through a `mailbox`; `training_job` is the training itself.
`placement` handles cluster resources, `network` the workers' connections. `heartbeat` and `watchdog` find processes
that hang or must leave their node. `evaluate_group` evaluates a model on one or more workers.
"""
