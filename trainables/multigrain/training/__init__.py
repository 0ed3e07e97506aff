"""Training of a network.

`fit` is the training loop, `trainer` performs its steps, `optimizers` builds optimizers and learning-rate schedules,
`finetune` learns the pooling exponent of a trained network.
"""
