"""Names of tags: MLflow's own, and those that say of which weights, files and process a run is."""

PROCESS, DIGEST, MODEL, PARENT = "advml.process", "advml.digest", "advml.model_id", "advml.pretraining_run"
FLAGS, TRANSFER_FLAGS, RESULT = "advml.flags", "advml.transfer_flags", "advml.result"
NOTE, TABLES, COMMIT = "mlflow.note.content", "mlflow.loggedArtifacts", "mlflow.source.git.commit"
NOW = "advml.now."  # values of parameters that the last measurement took otherwise than MLflow's columns say
UI_MODE = "workflowType=machine_learning"  # of a link: else the UI opens in its mode for language models
