"""Cleaning of rows."""

LIBRARIES: tuple[str, ...] = ()
