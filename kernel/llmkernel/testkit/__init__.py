"""Tests against the real core, without sockets and processes: a kernel in memory, a simulated world."""
