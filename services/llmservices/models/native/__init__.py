"""A decoder's step as one native call on CPU: sources, their build, and Python's side of it."""
