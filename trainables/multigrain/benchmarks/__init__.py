"""Evaluation of a trained network on the literature's benchmarks, on a user's own images, and by the proxy task for p*.

`readers` and the modules of the sets (`imagenet`, `instances`, `landmarks`, `lists`) read benchmarks from disk with the
help of `base` and `safe_pickle`. `inputs` gathers what an evaluation reads, `evaluate` runs it, `proxy` chooses p*,
`results` and `gallery` write tables, files and pictures, and `published` holds the paper's results.
"""
