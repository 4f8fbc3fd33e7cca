"""One folder a service; one service a process."""
