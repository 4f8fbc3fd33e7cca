"""The library in front of llmos: clients, service authors, the command line.

Names load on first use (PEP 562), so that `import libllm` and the command line's `--help` stay
fast.
"""

import importlib
from typing import TYPE_CHECKING

from libllm.version import __version__

if TYPE_CHECKING:
    from llmproto.errors import ErrorKind, RemoteError
    from llmproto.errors import RemoteError as LlmosError

    from libllm.client import AsyncClient, connect_async
    from libllm.results import Completion, Piece
    from libllm.sync import Client, connect
    from libllm.vectors import Classification, Embeddings

_HOMES = {
    "AsyncClient": "libllm.client",
    "Completion": "libllm.results",
    "Piece": "libllm.results",
    "connect_async": "libllm.client",
    "Classification": "libllm.vectors",
    "Embeddings": "libllm.vectors",
    "Client": "libllm.sync",
    "connect": "libllm.sync",
    "ErrorKind": "llmproto.errors",
    "RemoteError": "llmproto.errors",
}

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "Completion",
    "Embeddings",
    "ErrorKind",
    "LlmosError",
    "Piece",
    "RemoteError",
    "__version__",
    "connect",
    "connect_async",
]


def __getattr__(name: str) -> object:
    """Import what is asked for; `LlmosError` is the name of RemoteError for callers of the
    library."""
    wanted = "RemoteError" if name == "LlmosError" else name
    home = _HOMES.get(wanted)
    if home is None:
        raise AttributeError(f"module 'libllm' has no attribute {name!r}")
    found: object = vars(importlib.import_module(home))[wanted]
    globals()[name] = found
    return found
