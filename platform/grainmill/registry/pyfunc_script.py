"""Script that MLflow runs to load a registered model, whose own `model.py` maps a table to a table.

A copy is stored with each version. The script needs nothing but MLflow and pandas, and Grainmill never imports it.
"""

import runpy
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd


class TrainedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A portable model as an MLflow model."""

    def load_context(self, context: Any) -> None:
        """Load the model, which first checks its own files."""
        folder = Path(context.artifacts["model"])
        self._model = runpy.run_path(str(folder / "model.py"))["load"](folder)  # never from a __pycache__

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a table with one row for each row of the input."""
        return self._model(model_input)


mlflow.models.set_model(TrainedModel())
