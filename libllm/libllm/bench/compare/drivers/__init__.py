"""Other engines, each driven by its own interpreter; nothing here needs more than that engine and
the standard library."""
