"""Network and its weights.

`multigrain` is the network, `pooling` its GeM layer, `weights` loads a trunk's first weights, `whitening` transforms
embeddings, `checkpoint` saves training states, `served_setting` the size, exponent and whitening that a model serves.
"""
