"""`python -m tests.system.faults.jobkernel`: the kernel of `tests.system.faults.jobs`."""

from llmkernel.__main__ import Parts, main

from tests.system.faults.jobs import configure

if __name__ == "__main__":
    main(Parts(configure=configure))
