"""Embedding and measuring, shared by the metrics of held-out images and the evaluation on benchmarks.

`embed` computes embeddings at many settings, `benchmark` describes images with their right answers, `measure` searches
and classifies, and `held_out` computes the metrics of a training.
"""
