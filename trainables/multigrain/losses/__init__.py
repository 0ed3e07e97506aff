"""Losses of a training step.

`triplets` samples the pairs of views, `margin` holds the loss functions, `joint` combines them into the loss of one
rank's part of a step.
"""
