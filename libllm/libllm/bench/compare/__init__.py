"""This system beside other engines on the same machine: in turn, in one run, as ratios."""
