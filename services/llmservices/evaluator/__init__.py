"""The evaluator: judges a served model on data, one job a process."""
