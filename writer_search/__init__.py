"""A hyperparameter search for writer identification that you can stop and resume."""
