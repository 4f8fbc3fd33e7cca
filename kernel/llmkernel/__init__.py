"""The kernel process and init."""
