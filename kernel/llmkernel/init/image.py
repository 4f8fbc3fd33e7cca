"""What forked children find imported: torch and its company, where they are installed.

Invariant: importing leaves this process with one thread, or `usable` is False and nothing is forked
from it without exec.
"""

import gc
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Final

from llmkernel.init import lifeline
from llmkernel.init.logs import Log

MODULES: Final = (
    "msgspec",
    "structlog",
    "zmq.asyncio",
    "uvloop",
    "numpy",
    "safetensors",
    "torch",
)
"""None of them starts a thread when imported, but OpenBLAS, unless it is told to use one."""
_BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"


class Image:
    """Loaded once, when there is time for it."""

    def __init__(self, modules: Sequence[str], log: Log) -> None:
        self._modules = modules
        self._log = log
        self.loaded = False
        self.usable = False
        """Children may be forked from it without exec."""

    def load(self) -> None:
        """Import everything that is there; takes a second or two."""
        os.environ[_BLAS_THREADS] = "1"
        gc.disable()  # hundreds of thousands of new objects, none of them garbage
        for module in self._modules:
            self._load(module)
        del os.environ[_BLAS_THREADS]
        gc.enable()
        gc.collect()
        gc.freeze()  # pages that no collection touches stay shared
        self.loaded = True
        threads = lifeline.threads()
        self.usable = threads == 1
        if not self.usable:
            self._log.error("an import started threads: nothing is forked", threads=threads)

    def _load(self, module: str) -> None:
        try:
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                importlib.import_module(module)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            # A broken installation; who needs the module will say so in its own log.
            self._log.error("not imported", module=module, reason=str(error))
