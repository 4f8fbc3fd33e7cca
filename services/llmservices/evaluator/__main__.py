"""Starts the evaluator of one job."""

import sys

from libllm.config import ProcessEnvironment
from libllm.service import run

from llmservices.evaluator.arguments import read_arguments
from llmservices.evaluator.service import Evaluator


def main() -> None:
    """Never returns."""
    environment = ProcessEnvironment.read()
    arguments = read_arguments(sys.argv[1:])
    run(lambda port: Evaluator(port, arguments), role="evaluator", environment=environment)


if __name__ == "__main__":
    main()
