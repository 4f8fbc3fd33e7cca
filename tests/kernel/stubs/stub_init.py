"""Init with a kernel that the test plays itself."""

import sys

from llmkernel.init.__main__ import main
from llmkernel.init.loop import Programs

if __name__ == "__main__":
    standby = sys.argv.pop(1) == "True"
    sys.exit(main(sys.argv[1:], Programs("stub_kernel", standby=standby, image=["fractions"])))
