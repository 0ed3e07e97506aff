"""MLflow runs of a study.

`mlflow_runs` reads and writes runs; `sync` brings the runs of a study's trials up to date, in the background.
"""
