"""The library in front of llmos: clients, service authors, the command line."""
