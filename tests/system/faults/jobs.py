"""`python -m tests.system.faults.jobs`: init, with a kernel whose jobs are carried out by trainers
without models."""

import sys

import msgspec
from llmkernel.events import KernelConfig
from llmkernel.init.__main__ import main
from llmkernel.init.loop import Programs

KERNEL = "tests.system.faults.jobkernel"


def configure(config: KernelConfig) -> KernelConfig:
    """Another trainer."""
    return msgspec.structs.replace(config, trainer_module="tests.system.faults.trainer")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Programs(kernel=KERNEL)))
