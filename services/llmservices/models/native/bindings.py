"""The library as Python calls it: the structs of `sources/abi.h`, and its functions with types.

Invariant: a library that was not built from the sources beside it is never called.
"""

import ctypes
from pathlib import Path
from typing import Final, Protocol

from llmservices.models.native import build

FLOAT32: Final = 0
BFLOAT16: Final = 1
INT8: Final = 2
INT4: Final = 3
PANEL: Final = 32
BLOCK_TOKENS_MAX: Final = 16


class Matrix(ctypes.Structure):
    """LlmMatrix"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("grouped", ctypes.c_int32),
    ]


class Part(ctypes.Structure):
    """LlmPart"""

    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class Source(ctypes.Structure):
    """LlmSource"""

    _fields_ = [
        ("parts", ctypes.POINTER(Part)),
        ("part_count", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("in_turns", ctypes.c_int32),
    ]


class Layer(ctypes.Structure):
    """LlmLayer"""

    _fields_ = [
        ("qkv", Matrix),
        ("out", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("window", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class Model(ctypes.Structure):
    """LlmModel"""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("head", Matrix),
        ("layer_count", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        ("block_tokens", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("unused_float", ctypes.c_float),
    ]


class Plan(ctypes.Structure):
    """LlmPlan"""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("best_value", ctypes.c_void_p),
        ("best_token", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("segment_count", ctypes.c_int32),
        ("wanted_count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class Draw(ctypes.Structure):
    """LlmDraw"""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("first", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("token", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class Functions(Protocol):
    """What the library exports, with the types that ctypes is told."""

    def llm_digest(self) -> bytes: ...

    def llm_isas(self) -> bytes: ...

    def llm_block_bytes(self, model: "ctypes._Pointer[Model]", /) -> int: ...

    def llm_open(
        self, model: "ctypes._Pointer[Model]", threads: int, rows_max: int, isa: bytes, /
    ) -> int | None: ...

    def llm_step(self, engine: int, plan: "ctypes._Pointer[Plan]", /) -> int: ...

    def llm_draw(self, engine: int, draws: "ctypes.Array[Draw]", count: int, /) -> None: ...

    def llm_close(self, engine: int, /) -> None: ...

    def llm_pack(
        self,
        source: "ctypes._Pointer[Source]",
        to: "ctypes._Pointer[Matrix]",
        threads: int,
        isa: bytes,
        /,
    ) -> int: ...

    def llm_forget_pages(self, start: int, size: int, /) -> None: ...

    def llm_prefer_large_pages(self, start: int, size: int, /) -> None: ...

    def llm_read_bandwidth(self, start: int, size: int, threads: int, isa: bytes, /) -> float: ...

    def llm_dot_peak(self, kind: int, rounds: int, threads: int, isa: bytes, /) -> float: ...

    def llm_trim(self) -> None: ...


def open_library(path: Path = build.LIBRARY) -> Functions | str:
    """The library; where it cannot serve, why, in a few words."""
    if not path.exists():
        return "native step not built"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"native step does not load: {error}"
    library.llm_digest.restype = ctypes.c_char_p
    if library.llm_digest() != build.digest().encode():
        return "native step built from other sources"
    library.llm_isas.restype = ctypes.c_char_p
    library.llm_block_bytes.argtypes = [ctypes.POINTER(Model)]
    library.llm_block_bytes.restype = ctypes.c_int64
    library.llm_open.argtypes = [
        ctypes.POINTER(Model),
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_char_p,
    ]
    library.llm_open.restype = ctypes.c_void_p
    library.llm_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(Plan)]
    library.llm_step.restype = ctypes.c_int32
    library.llm_draw.argtypes = [ctypes.c_void_p, ctypes.POINTER(Draw), ctypes.c_int32]
    library.llm_draw.restype = None
    library.llm_close.argtypes = [ctypes.c_void_p]
    library.llm_close.restype = None
    library.llm_pack.argtypes = [
        ctypes.POINTER(Source),
        ctypes.POINTER(Matrix),
        ctypes.c_int32,
        ctypes.c_char_p,
    ]
    library.llm_pack.restype = ctypes.c_int32
    library.llm_forget_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.llm_forget_pages.restype = None
    library.llm_prefer_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.llm_prefer_large_pages.restype = None
    library.llm_read_bandwidth.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_char_p,
    ]
    library.llm_read_bandwidth.restype = ctypes.c_double
    library.llm_dot_peak.argtypes = [
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_char_p,
    ]
    library.llm_dot_peak.restype = ctypes.c_double
    library.llm_trim.argtypes = []
    library.llm_trim.restype = None
    functions: Functions = library  # ctypes finds functions by name
    return functions
