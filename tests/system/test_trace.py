"""A live kernel's trace, on request: the same events give a fresh kernel the same tables."""

from llmkernel.core import Kernel
from llmkernel.events import Record
from llmkernel.facts import TokensCommitted
from llmkernel.trace import read_trace

import libllm

from .conftest import EXACT, Boot


def test_a_trace_of_a_live_kernel_is_replayed(booted: Boot) -> None:
    system = booted(f"[kernel]\ntrace = true\n{EXACT}")
    with libllm.connect(system.home.root) as llm:
        done = llm.generate("The for statement", max_tokens=8, ignore_eos=True)
    system.stop()
    state, entries = read_trace(system.home.run / "trace-1.bin")
    kernel = Kernel(state)
    effects = [effect for entry in entries for effect in kernel.handle(entry.now_ns, entry.event)]
    facts = [effect.fact for effect in effects if isinstance(effect, Record)]
    committed = [fact for fact in facts if isinstance(fact, TokensCommitted)]
    assert sum(len(fact.tokens) for fact in committed) == done.usage.output_tokens == 8
    kernel.check()
