"""Measurements of a running system; what `llmos bench` starts."""
