"""Whole tasks: `tune` and train, `evaluate`, and `forecast` for the time and price of a search.

`run_folder` decides where a run keeps its files, and which process may write there.
"""
