"""Measures the engine alone, in one process, on random weights of real shapes.

`python -m llmservices.executor.bench --shape qwen2-0.5b --streams 1 8 32 --context 128 2048
--prefill 512` prints a table, with `--json` one document. Beside every figure stands what the
processor could do at that moment (memory read, dot products), and the fraction that was reached.
"""

import argparse
import itertools
import json
import sys
import time

import msgspec
import torch
from llmproto.generation import Sampling
from rich.console import Console

from llmservices.executor import bench_report, roofline
from llmservices.executor.bench_report import Figure, Report, figure, spread
from llmservices.executor.contract import Admission, EngineConfig, Proposal
from llmservices.executor.core import Engine
from llmservices.executor.roofline import Ceilings, Gauge
from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.linear import Linear
from llmservices.models.native.bindings import open_library
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.native.packing import Packer
from llmservices.models.rope import Rope
from llmservices.models.shapes import SHAPES
from llmservices.models.spec import DecoderSpec

_BLOCK_TOKENS = 16
WIDTH = 160
"""Of a table that goes into a file."""


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
                qkv=Linear(weight(qkv, hidden), bias=weight(qkv) if biased else None),
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
        longest = max([*arguments.context, 0]) + arguments.output
        self._context = max([longest, *arguments.prefill]) + 1
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.dtype]
        self._model: Decoder | NativeDecoder = random_decoder(arguments.shape, dtype, self._context)
        functions = open_library()
        precision = arguments.dtype
        if arguments.path == "native":
            if isinstance(functions, str):
                raise SystemExit(functions)
            self._model = NativeDecoder(
                self._model, arguments.weights, Packer(functions, arguments.threads)
            )
            precision = self._model.precision
            torch.set_num_threads(1)
        self._dot = roofline.DOT_OF[precision]
        self._gauge: Gauge | None = None
        if not isinstance(functions, str):
            size = roofline.beyond_caches(arguments.buffer_mib << 20)
            self._gauge = Gauge(functions, threads=arguments.threads, buffer_bytes=size)
        self._ceilings: list[Ceilings] = []
        self._path = ""
        self._residencies = itertools.count(1)

    def report(self) -> Report:
        """Every case in turn."""
        arguments = self._arguments
        cases = [
            (streams, context) for context in arguments.context for streams in arguments.streams
        ]
        figures = [self.decode(streams, context) for streams, context in cases]
        figures += [self.prefill(tokens) for tokens in arguments.prefill]
        return Report(
            arguments=vars(arguments),
            path=self._path,
            weight_bytes=self._model.weight_bytes,
            kv_token_bytes=self._model.kv_token_bytes,
            figures=figures,
            dot_operations_per_s={
                kind: spread([each.dot_operations_per_s[kind] for each in self._ceilings])
                for kind in (roofline.DOT_KINDS if self._ceilings else ())
            },
            torch=str(torch.__version__),
            python=sys.version.split()[0],
        )

    def decode(self, streams: int, context: int) -> Figure:
        """Tokens a second while every stream generates, prompts already computed."""
        arguments = self._arguments
        engine = self._engine(streams)
        rates: list[float] = []
        ceilings: list[Ceilings] = []
        attended = made = 0
        for _ in range(arguments.repeat):
            held = [
                self._add(engine, context, arguments.output, stream) for stream in range(streams)
            ]
            engine.step()
            while any(not engine.proposals_after(residency, 0) for residency in held):
                self._step(engine)
            ceilings += self._measured()
            before, start = engine.counters.tokens, time.perf_counter()
            while engine.runnable():
                for row in self._step(engine):
                    attended, made = attended + row.position, made + 1
            rates.append((engine.counters.tokens - before) / (time.perf_counter() - start))
            for residency in held:
                engine.drop(residency)
        mean = attended / made
        model = self._model
        return figure(
            "decode",
            streams=streams,
            context=context,
            tokens_per_s=rates,
            bytes_per_token=roofline.decode_bytes(
                # Embedding and head are one matrix here: a step reads all of it.
                model.weight_bytes,
                model.kv_token_bytes,
                streams=streams,
                context=mean,
            ),
            operations_per_token=roofline.decode_operations(model.spec, mean),
            dot=self._dot,
            ceilings=ceilings,
        )

    def prefill(self, tokens: int) -> Figure:
        """Prompt tokens a second of one thread."""
        engine = self._engine(1)
        rates: list[float] = []
        ceilings: list[Ceilings] = []
        for repetition in range(self._arguments.repeat + 1):
            measured = self._measured()
            start = time.perf_counter()
            residency = self._add(engine, tokens, 1, repetition)
            while engine.runnable():
                engine.step()
            engine.drop(residency)
            if repetition:
                rates.append(tokens / (time.perf_counter() - start))
                ceilings += measured
        return figure(
            "prefill",
            streams=1,
            context=tokens,
            tokens_per_s=rates,
            bytes_per_token=None,
            operations_per_token=roofline.prefill_operations(self._model.spec, tokens),
            dot=self._dot,
            ceilings=ceilings,
        )

    def _measured(self) -> list[Ceilings]:
        """What the processor can do now; nothing where no library was built."""
        found = [] if self._gauge is None else [self._gauge.measure()]
        self._ceilings += found
        return found

    def _engine(self, streams: int) -> Engine:
        blocks = streams * (-(-self._context // _BLOCK_TOKENS) + 1)
        config = EngineConfig(
            blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
            step_tokens=self._arguments.step_tokens,
            exact=self._arguments.exact,
            threads=self._arguments.threads,
        )
        engine = Engine(self._model, config)
        self._path = engine.path
        return engine

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
    def _step(engine: Engine) -> list[Proposal]:
        rows = engine.step().rows
        for row in rows:
            # One behind, as a watermark is.
            engine.watermark(row.residency, row.position - 1)
        return rows


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m llmservices.executor.bench")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--path", choices=["native", "torch"], default="native")
    parser.add_argument("--weights", choices=["auto", "int8", "int4"], default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="*", default=[32], help="decode: batches")
    parser.add_argument(
        "--context", type=int, nargs="*", default=[128], help="decode: tokens of each prompt"
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="decode: tokens of each stream")
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument(
        "--buffer-mib", type=int, default=512, help="read for the bandwidth; four times all caches"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Bench(arguments).report()
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(report), indent=1))
    else:
        width = None if sys.stdout.isatty() else WIDTH
        Console(width=width).print(bench_report.table(report))


if __name__ == "__main__":
    main()
