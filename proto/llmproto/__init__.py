"""The wire schema: every message that crosses a process boundary, defined once."""
