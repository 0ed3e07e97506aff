"""Registered models: versions in MLflow's registry, what is known about them, and which one users get.

`models` registers and downloads versions; `model_card` says where they come from and `integrity` that their files are
unchanged. `comparison` stores scores of versions and compares them; `promotion`, under a `promotion_lock`, moves the
alias `champion`. `pyfunc_script` is stored with each version for MLflow to load it.
"""
