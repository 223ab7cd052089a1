"""Training: losses and tasks of schemes, adversarial training, and the training loop."""
