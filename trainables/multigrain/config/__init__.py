"""Settings of the method: every pydantic model, for `training`, `data`, `evaluation` and `finetune`."""
