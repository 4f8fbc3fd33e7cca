"""`llmos bench`: hands over to the program that measures."""

import os
import sys
from enum import StrEnum
from typing import Annotated, Final

import typer


class What(StrEnum):
    """What can be measured."""

    BOOT = "boot"
    CPU = "cpu"
    RECOVERY = "recovery"
    OVERHEAD = "overhead"
    ROLLBACK = "rollback"
    BESIDE = "beside"
    KERNEL = "kernel"
    CORE = "core"
    SHAPE = "shape"
    DATA = "data"
    STORE = "store"
    TRAIN = "train"
    SERVE = "serve"
    COMPARE = "compare"
    LOAD = "load"
    PREFIXES = "prefixes"
    GOALS = "goals"
    COLD = "cold"
    EMBED = "embed"


PROGRAMS: Final = {
    What.BOOT: ("libllm.bench", "boot"),
    What.CPU: ("libllm.bench", "cpu"),
    What.RECOVERY: ("libllm.bench", "recovery"),
    What.OVERHEAD: ("libllm.bench", "overhead"),
    What.ROLLBACK: ("libllm.bench", "rollback"),
    What.BESIDE: ("libllm.bench", "beside"),
    What.KERNEL: ("llmkernel.bench",),
    What.CORE: ("llmservices.executor.bench",),
    What.SHAPE: ("llmservices.models.shapes",),
    What.DATA: ("llmservices.data.bench",),
    What.STORE: ("llmservices.store.bench",),
    What.TRAIN: ("llmservices.trainer.bench",),
    What.SERVE: ("libllm.bench.serve",),
    What.EMBED: ("libllm.bench.embed",),
    What.COMPARE: ("libllm.bench.compare",),
    What.LOAD: ("libllm.bench.compare.load",),
    What.PREFIXES: ("libllm.bench.compare.prefixes",),
    What.GOALS: ("libllm.bench.compare.goals",),
    What.COLD: ("libllm.bench.cold",),
}


def program(what: What, arguments: list[str]) -> list[str]:
    """The command line that measures it."""
    module, *first = PROGRAMS[what]
    return [sys.executable, "-P", "-m", module, *first, *arguments]


def bench(
    what: Annotated[
        What,
        typer.Argument(
            help="boot: boot, rest, memory. cpu: processor time a token. recovery: SIGKILL to the "
            "next token. overhead: a system against its engine alone (--folder). rollback: command "
            "to the other version's first token. beside: what training and serving cost each "
            "other. kernel: the kernel's core. "
            "core: the engine, and which part of memory bandwidth and arithmetic peak it reaches. "
            "shape NAME FOLDER: a random-weight model. "
            "data: tokens a second to a trainer, against the usual libraries. "
            "store: saving and loading a version, against one file of the same bytes. "
            "train: steps against transformers.Trainer and nanoGPT. "
            "serve: a load on any OpenAI-compatible server, or on a system. compare: "
            "this system and other engines in turn. load: it and vLLM under a recorded trace. "
            "prefixes: what of shared prefixes is not computed again. goals: what such records "
            "come to. cold: request to first token of a model that is not loaded, and the "
            "executor's memory. embed: embeddings against sentence-transformers."
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on; --help after -- tells which there are.")
    ] = None,
) -> None:
    """Measure this machine; prints JSON."""
    command = program(what, arguments or [])
    os.execv(command[0], command)
