"""The examples that start Ray, each run as its text says."""

import os
import subprocess
import sys

from commands import ROOT, python_path


def run(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), python_path()])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_trainable_of_ones_own_is_searched_and_registered(tmp_path):
    out = run(["-m", "grainmill", "tune", ROOT / "examples" / "own_trainable.yaml"], tmp_path)
    assert "models:/own-trainable/1" in out
    script = f"""
import mlflow, numpy as np, pandas as pd
from sklearn.datasets import load_digits
mlflow.set_tracking_uri("sqlite:///{tmp_path}/grainmill-runs/mlflow.db")
model = mlflow.pyfunc.load_model("models:/own-trainable@champion")
digits = load_digits()
table = pd.DataFrame({{"pixels": [(row / 16).tolist() for row in digits.data[:400]]}})
print(np.mean(model.predict(table)["digit"] == digits.target[:400]))
"""
    assert float(run(["-c", script], tmp_path).splitlines()[-1]) > 0.8


def test_photos_become_a_model_and_a_list_of_duplicates(tmp_path):
    lines = run([ROOT / "examples" / "photos_to_duplicates.py"], tmp_path).splitlines()[-10:]
    pairs = [[name.replace("-copy", "") for name in line.split()[1:]] for line in lines]
    assert sum(one == other for one, other in pairs) >= 3, lines
    assert (tmp_path / "photos.index.reports" / "duplicates.html").exists()
    assert len([*(tmp_path / "photos").glob("*/*-copy.jpg")]) == 9
