"""MLflow as processes beside ours: its UI opened on a study, and a server that a group shares."""
