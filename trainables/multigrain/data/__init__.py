"""Images on disk: from folders and manifests to batches of tensors.

`folders` and `manifest` list a `dataset`; `validation` checks its files and `fingerprint` identifies it; `builtin`
writes one. `image_sources` lists the images of a corpus. `sampler`, `transforms` and `loading` make batches, `picture`
is a part of a file.
"""
