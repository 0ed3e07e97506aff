"""The mill: reads an experiment file, runs its trials on Ray, records them in MLflow, registers the best."""
