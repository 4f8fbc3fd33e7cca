"""What the kernel starts a job's process with."""

import argparse
from collections.abc import Sequence

import msgspec


class Arguments(msgspec.Struct, frozen=True):
    """Which attempt of which job this process carries."""

    job: bytes
    attempt: int


def read_arguments(arguments: Sequence[str]) -> Arguments:
    """Of the command line; those of ranks and leases say nothing to an evaluator, which computes
    nothing heavy itself."""
    parser = argparse.ArgumentParser(prog="llmservices.evaluator")
    parser.add_argument("--job", required=True, type=bytes.fromhex)
    parser.add_argument("--attempt", required=True, type=int)
    found, _ = parser.parse_known_args(arguments)
    return Arguments(found.job, found.attempt)
