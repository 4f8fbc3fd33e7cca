"""For tests against the real core: a kernel in memory, and a simulated world around it."""
