"""The script that MLflow runs to load a registered model: table in, table out, as the model's own `model.py` has it.

It is stored with the model, needs nothing but MLflow, and is not imported by the mill.
"""

import runpy
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd


class TrainedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A portable model as an MLflow model."""

    def load_context(self, context: Any) -> None:
        """Load it, after its own look at its files."""
        folder = Path(context.artifacts["model"])
        self._model = runpy.run_path(str(folder / "model.py"))["load"](folder)  # never from a __pycache__

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each row of the input."""
        return self._model(model_input)


mlflow.models.set_model(TrainedModel())
