"""Names of tags: MLflow's own, and those for weights, files and process of a run."""

PROCESS, DIGEST, MODEL, PARENT = "advml.process", "advml.digest", "advml.model_id", "advml.pretraining_run"
FLAGS, TRANSFER_FLAGS, RESULT = "advml.flags", "advml.transfer_flags", "advml.result"
NOTE, TABLES, COMMIT = "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.source.git.commit"
NOW = "advml.now."  # prefix; current values of parameters that have changed since MLflow stored them, which cannot be overwritten
UI_MODE = "workflowType=machine_learning"  # part of links; without it the UI opens in its mode for language models
