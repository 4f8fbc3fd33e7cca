"""`python -m tests.system.faults.init`: init, with kernels that pass points."""

import sys

from llmkernel.init.__main__ import main
from llmkernel.init.loop import Programs

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Programs(kernel="tests.system.faults.kernel")))
