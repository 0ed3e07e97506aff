"""The script that MLflow runs to load a registered model: table in, table out, as the trainable's `load` gives it.

It is stored with the model, beside the packages that it imports, and is not imported by the mill.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from grainmill import catalog


class TrainedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A trainable's predictor as an MLflow model."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint that the model holds."""
        trainable = catalog.find(context.model_config["trainable"])
        self._predictor = trainable.load(Path(context.artifacts["checkpoints"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each row of the input."""
        return self._predictor(model_input)


mlflow.models.set_model(TrainedModel())
