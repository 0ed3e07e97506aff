"""A corpus of images and a registered model that embeds them.

`embedder` calls the model, `embed` writes the embeddings of a corpus to an `index` with Ray Data, and `query` finds the
nearest images and duplicates in it, by `nearest` (exact search) and `duplicate_precision` (an estimate).
`thumbnails` writes the pages with pictures.
"""
