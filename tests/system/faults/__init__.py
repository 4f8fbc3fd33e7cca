"""Processes that fail on purpose: the real ones with a part replaced, started instead of them.

The tests arm points (`points.arm`) and mark prompts (`executor`); nothing in the product knows.
"""
