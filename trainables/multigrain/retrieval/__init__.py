"""Search by descriptors, and its measures. It knows nothing of networks or files.

`scores` multiplies descriptors, `ranking` ranks the items of a database, and `metrics` computes measures of ranks.
"""
