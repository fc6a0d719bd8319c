"""Training, evaluation and use of the models from configurations, on Lightning."""
