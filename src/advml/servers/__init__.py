"""Run MLflow's UI for a study, and an MLflow server for a group."""
