"""Measures the engine alone, in one process, on random weights of real shapes.

`python -m llmservices.executor.bench --shape qwen2-0.5b --streams 1 32 --prefill 512` prints
one JSON object. Decode: tokens a second while every stream generates, prompts already computed.
Prefill: prompt tokens a second.
"""

import argparse
import itertools
import json
import statistics
import sys
import time

import torch
from llmproto.generation import Sampling

from llmservices.executor.contract import Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.linear import Linear
from llmservices.models.native.bindings import open_library
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.rope import Rope
from llmservices.models.shapes import SHAPES
from llmservices.models.spec import DecoderSpec

_BLOCK_TOKENS = 16


def random_decoder(shape: str, dtype: torch.dtype, context_tokens: int) -> Decoder:
    """A decoder of a named shape with small random weights."""
    numbers = SHAPES[shape]
    hidden, layers, heads, kv_heads = (
        numbers.hidden,
        numbers.layers,
        numbers.heads,
        numbers.kv_heads,
    )
    dim, inner, vocab, base = (
        numbers.head_dim,
        numbers.inner,
        numbers.vocab,
        numbers.rope_theta,
    )
    biased = numbers.qkv_bias
    generator = torch.Generator().manual_seed(0)

    def weight(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float32).mul_(0.02).to(dtype)

    def norm() -> Norm:
        return Norm(torch.ones(hidden, dtype=dtype), None, eps=1e-6, offset=0.0, rms=True)

    qkv = (heads + 2 * kv_heads) * dim
    embedding = weight(vocab, hidden)
    spec = DecoderSpec(
        family="random",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        inner=inner,
        vocab_tokens=vocab,
        context_tokens=context_tokens,
        norm_eps=1e-6,
        activation="silu",
        ropes=[Rope([base ** (-i / dim) for i in range(0, dim, 2)])],
        rope_of=[0] * layers,
        windows=[None] * layers,
        attention_scale=dim**-0.5,
    )
    return Decoder(
        spec,
        embedding_VC=embedding,
        positions_TC=None,
        layers=[
            Layer(
                attention_norm=norm(),
                qkv=Linear(weight(qkv, hidden), weight(qkv) if biased else None),
                out=Linear(weight(hidden, heads * dim)),
                mlp_norm=norm(),
                up=Linear(weight(2 * inner, hidden)),
                down=Linear(weight(hidden, inner)),
            )
            for _ in range(layers)
        ],
        final_norm=norm(),
        head=Linear(embedding),
    )


class Bench:
    """One model, and engines over it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._context = max([arguments.prompt + arguments.output, *arguments.prefill]) + 1
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.dtype]
        self._model: Decoder | NativeDecoder = random_decoder(arguments.shape, dtype, self._context)
        if arguments.path == "native":
            functions = open_library()
            if isinstance(functions, str):
                raise SystemExit(functions)
            self._model = NativeDecoder(self._model, arguments.weights, functions)
            torch.set_num_threads(1)
        self._residencies = itertools.count(1)

    def decode(self, streams: int) -> list[float]:
        """Tokens a second, one figure a repetition."""
        arguments = self._arguments
        engine = self._engine(streams)
        figures = []
        for _ in range(arguments.repeat):
            held = [
                self._add(engine, arguments.prompt, arguments.output, stream)
                for stream in range(streams)
            ]
            engine.step()
            while any(not engine.proposals_after(residency, 0) for residency in held):
                self._step(engine)
            before, start = engine.counters.tokens, time.perf_counter()
            while engine.runnable():
                self._step(engine)
            figures.append((engine.counters.tokens - before) / (time.perf_counter() - start))
            for residency in held:
                engine.drop(residency)
        return figures

    def prefill(self, tokens: int) -> list[float]:
        """Prompt tokens a second of one thread."""
        engine = self._engine(1)
        figures = []
        for repetition in range(self._arguments.repeat + 1):
            start = time.perf_counter()
            residency = self._add(engine, tokens, 1, repetition)
            while engine.runnable():
                engine.step()
            engine.drop(residency)
            if repetition:
                figures.append(tokens / (time.perf_counter() - start))
        return figures

    def _engine(self, streams: int) -> Engine:
        blocks = streams * (-(-self._context // _BLOCK_TOKENS) + 1)
        config = EngineConfig(
            blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
            step_tokens=self._arguments.step_tokens,
            exact=self._arguments.exact,
            threads=self._arguments.threads,
        )
        return Engine(self._model, config)

    def _add(self, engine: Engine, prompt: int, output: int, salt: int) -> int:
        residency = next(self._residencies)
        vocab = self._model.vocab_tokens
        engine.add(
            Admission(
                thread=residency.to_bytes(8, "big"),
                residency=residency,
                # No prefix is shared: every prompt begins with another token.
                tokens=[(residency * 7919 + 31 * i) % vocab for i in range(prompt)],
                prompt_tokens=prompt,
                output_tokens_max=output,
                sampling=Sampling(temperature=self._arguments.temperature, seed=salt),
            )
        )
        return residency

    @staticmethod
    def _step(engine: Engine) -> None:
        for row in engine.step().rows:
            # One behind, as a watermark is.
            engine.watermark(row.residency, row.position - 1)


def main() -> None:
    """Print the figures: medians, least and greatest."""
    parser = argparse.ArgumentParser(prog="python -m llmservices.executor.bench")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--path", choices=["native", "torch"], default="native")
    parser.add_argument("--weights", choices=["auto", "int8", "int4"], default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="*", default=[32])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    figures = {
        "decode_tokens_per_s": {str(n): bench.decode(n) for n in arguments.streams},
        "prefill_tokens_per_s": {str(n): bench.prefill(n) for n in arguments.prefill},
    }
    report = {
        "arguments": vars(arguments),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        **{
            name: {
                size: {
                    "median": round(statistics.median(values), 1),
                    "least": round(min(values), 1),
                    "greatest": round(max(values), 1),
                }
                for size, values in by_size.items()
            }
            for name, by_size in figures.items()
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
