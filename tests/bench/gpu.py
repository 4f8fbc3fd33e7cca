"""Measures the engine on a GPU, in turns with the continuous batching of transformers.

`python tests/bench/gpu.py --shape llama-8b --batches 1 64 256 --prefill 2048 8192` prints one JSON
document.  Both sides compute with the same random weights in the same process and make the same
number of tokens.  See README.md beside it for what the figures mean.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from llmproto.generation import Sampling
from llmservices.executor import roofline
from llmservices.executor.contract import Admission, EngineConfig, Proposal
from llmservices.executor.core import Engine
from llmservices.executor.gpu.graphs import Graph
from llmservices.executor.gpu.operations import MakeOperations, Plain
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.executor.gpu.sampling import Drawn
from llmservices.executor.runner import Work
from llmservices.executor.sampler import Ask
from llmservices.models import shapes
from llmservices.models.decoder import Decoder, Layer, Norm
from llmservices.models.linear import Linear
from llmservices.models.rope import Rope
from llmservices.models.spec import DecoderSpec

BLOCK_TOKENS = 16
DEVICE = "cuda"
PUBLISHED_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense operations a second by a part of the device's name; source: NVIDIA's data sheets (SXM)."""


def timer() -> torch.cuda.Event:
    """A mark on the device's own clock."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


class TimedRunner(GpuRunner):
    """Notes on the device's own clock when each step begins and ends."""

    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def compute(self, works: Sequence[Work]) -> torch.Tensor | None:
        self._begin()
        return super().compute(works)

    def _graph(self, bucket: int, width: int) -> Graph:
        found = super()._graph(bucket, width)
        # What the host does before it starts a graph is no part of the step.
        self._begin()
        return found

    def _begin(self) -> None:
        self._began = timer()
        self._began.record()

    def draw(
        self,
        logits_WV: torch.Tensor,
        picked: Sequence[int],
        residencies: Sequence[int],
        asks: Sequence[Ask],
    ) -> Drawn:
        drawn = super().draw(logits_WV, picked, residencies, asks)
        ended = timer()
        ended.record()
        self.events.append((self._began, ended))
        return drawn


class Ours:
    """One decoder, an engine at a time."""

    def __init__(self, model: Decoder, operations: MakeOperations) -> None:
        self._model, self._operations = model, operations
        self._residencies = itertools.count(1)

    def engine(self, streams: int, tokens: int, step_tokens: int) -> tuple[Engine, TimedRunner]:
        """With room for so many threads of so many tokens."""
        # The one before holds itself, by its graphs, and all its memory with it.
        gc.collect()
        torch.cuda.empty_cache()
        blocks = streams * (-(-tokens // BLOCK_TOKENS) + 1)
        runner = TimedRunner(
            self._model,
            blocks=blocks,
            block_tokens=BLOCK_TOKENS,
            residents_max=streams,
            operations=self._operations,
        )
        config = EngineConfig(
            blocks=blocks,
            block_tokens=BLOCK_TOKENS,
            residents_max=streams,
            step_tokens=step_tokens,
        )
        return Engine(self._model, config, runner=runner), runner

    def batch(self, engine: Engine, prompts: list[list[int]], output: int) -> float:
        """Seconds from the prompts to the last token."""
        began = time.perf_counter()
        self.add(engine, prompts, output)
        drain(engine)
        return time.perf_counter() - began

    def add(self, engine: Engine, prompts: list[list[int]], output: int) -> None:
        for prompt in prompts:
            residency = next(self._residencies)
            engine.add(
                Admission(
                    thread=residency.to_bytes(8, "big"),
                    residency=residency,
                    tokens=prompt,
                    prompt_tokens=len(prompt),
                    output_tokens_max=output,
                    sampling=Sampling(temperature=0.0, ignore_eos=True),
                    domain=residency.to_bytes(16, "big"),  # no prefix is shared
                )
            )

    def decode(self, streams: int, prompt: int, output: int, ceilings: dict[str, float]) -> Any:
        """Decode alone, prompts already computed, beside what the device could do."""
        engine, runner = self.engine(streams, prompt + output, 4096)
        self.add(engine, prompts_of(streams, prompt, self._model.vocab_tokens, 1), output)
        begun: set[int] = set()
        while len(begun) < streams:  # every prompt has given its first token
            begun |= {row.residency for row in step(engine)}
        torch.cuda.synchronize()
        runner.events.clear()
        # Rows, not tokens: those of the step that is under way are computed already.
        before, began = engine.counters.rows, time.perf_counter()
        drain(engine)
        seconds = time.perf_counter() - began
        made = engine.counters.rows - before
        steps_ms = [start.elapsed_time(end) for start, end in runner.events]
        gaps_ms = [
            max(0.0, last[1].elapsed_time(following[0]))
            for last, following in itertools.pairwise(runner.events)
        ]
        context = prompt + output / 2
        weights = self._model.weight_bytes - self._model.embedding_VC.nbytes
        read = roofline.decode_bytes(
            weights, self._model.kv_token_bytes, streams=streams, context=context
        )
        rate = made / seconds
        operations = roofline.decode_operations(self._model.spec, context)
        return {
            "streams": streams,
            "path": engine.path,
            "tokens_per_s": rate,
            "bandwidth_fraction": rate * read / ceilings["bytes_per_s"],
            "bf16_fraction": rate * operations / ceilings["bf16_per_s"],
            "step_ms": statistics.median(steps_ms),
            "gap_ms": statistics.median(gaps_ms),
            "gap_fraction": sum(gaps_ms) / (sum(gaps_ms) + sum(steps_ms)),
        }

    def prefill(self, tokens: int, rounds: int, ceilings: dict[str, float]) -> Any:
        """One prompt in one step."""
        engine, _ = self.engine(1, tokens + 1, tokens)
        rates = []
        for number in range(rounds + 1):
            prompts = prompts_of(1, tokens, self._model.vocab_tokens, number)
            rates.append(tokens / self.batch(engine, prompts, 1))
        rate = statistics.median(rates[1:])
        reached = rate * roofline.prefill_operations(self._model.spec, tokens)
        return {
            "tokens": tokens,
            "tokens_per_s": rate,
            "bf16_fraction": reached / ceilings["bf16_per_s"],
            "bf16_fraction_published": reached / ceilings["bf16_published_per_s"],
        }


def step(engine: Engine) -> list[Proposal]:
    """What one step proposed."""
    rows = engine.step().rows
    for row in rows:
        engine.watermark(row.residency, row.position)
        if row.end:
            engine.drop(row.residency)
    return rows


def drain(engine: Engine) -> None:
    """To the last token."""
    while engine.runnable():
        step(engine)


def prompts_of(streams: int, tokens: int, vocab: int, salt: int) -> list[list[int]]:
    """No two begin alike."""
    return [
        [(stream * 7919 + salt * 104_729 + 31 * i) % vocab for i in range(tokens)]
        for stream in range(streams)
    ]


def library_model(shape: shapes.Shape, context_tokens: int) -> Any:
    """Of transformers, with random weights, on the GPU; head and embedding are two matrices."""
    said = shapes.config(shape, context_tokens=context_tokens) | {"tie_word_embeddings": False}
    kind = said.pop("model_type")
    config = transformers.AutoConfig.for_model(str(kind), **said)
    # Any: the library's own methods are untyped.
    library: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = library.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def decoder_of(shape: shapes.Shape, library: Any, context_tokens: int) -> Decoder:
    """Ours, with the library's weights."""
    found: dict[str, torch.Tensor] = library.state_dict()

    def linear(*names: str) -> Linear:
        biases = [found.get(f"{name}.bias") for name in names]
        given = [bias for bias in biases if bias is not None]
        weights = [found[f"{name}.weight"] for name in names]
        return Linear(*weights, bias=torch.cat(given) if given else None)

    def norm(name: str) -> Norm:
        return Norm(found[f"{name}.weight"], None, eps=1e-6, offset=0.0, rms=True)

    spec = DecoderSpec(
        family=shape.model_type,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        inner=shape.inner,
        vocab_tokens=shape.vocab,
        context_tokens=context_tokens,
        norm_eps=1e-6,
        activation="silu",
        ropes=[Rope.plain(shape.rope_theta, shape.head_dim)],
        rope_of=[0] * shape.layers,
        windows=[None] * shape.layers,
        attention_scale=shape.head_dim**-0.5,
    )
    layers = []
    for index in range(shape.layers):
        at, attn, mlp = (f"model.layers.{index}{part}" for part in ("", ".self_attn", ".mlp"))
        layers.append(
            Layer(
                attention_norm=norm(f"{at}.input_layernorm"),
                qkv=linear(*(f"{attn}.{name}_proj" for name in "qkv")),
                out=linear(f"{attn}.o_proj"),
                mlp_norm=norm(f"{at}.post_attention_layernorm"),
                up=linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                down=linear(f"{mlp}.down_proj"),
            )
        )
    return Decoder(
        spec,
        embedding_VC=found["model.embed_tokens.weight"],
        positions_TC=None,
        layers=layers,
        final_norm=norm("model.norm"),
        head=linear("lm_head"),
    )


def best(work: Callable[[], object], times: int = 10) -> float:
    """Seconds of the fastest of some runs, by the device's clock."""
    found: list[float] = []
    for _ in range(times):
        start, end = timer(), timer()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return min(found)


def ceilings() -> dict[str, float]:
    """What the device does with nothing else to do: memory read, and products of matrices."""
    buffer = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    read = buffer.nbytes / best(buffer.sum)
    copied = 2 * (buffer.nbytes // 2) / best(lambda: buffer[: 1 << 29].copy_(buffer[1 << 29 :]))
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    peak = 2 * 8192**3 / best(lambda: a @ a)
    name = torch.cuda.get_device_name()
    published = next((value for part, value in PUBLISHED_BF16.items() if part in name), peak)
    return {
        "bytes_per_s": max(read, copied),
        "bf16_per_s": peak,
        "bf16_published_per_s": published,
    }


def library_batch(model: Any, prompts: list[list[int]], output: int) -> float:
    """Seconds that generate_batch takes."""
    make: Any = transformers.GenerationConfig  # Any: untyped
    config = make(
        max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    torch.cuda.synchronize()
    began = time.perf_counter()
    answers = model.generate_batch(
        prompts, generation_config=config, progress_bar=False, persistent_manager=True
    )
    seconds = time.perf_counter() - began
    made = [len(answer.generated_tokens) for answer in answers.values()]
    assert made == [output] * len(prompts), f"transformers made {made} tokens"
    return seconds


def pair(
    ours: Ours, library: Any, streams: int, arguments: argparse.Namespace, vocab: int
) -> dict[str, object]:
    """Both sides in turn, prompts included; the first round warms up."""
    prompt, output = arguments.prompt, arguments.output
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    engine, _ = ours.engine(streams, prompt + output, 4096)
    for number in range(arguments.rounds + 1):
        prompts = prompts_of(streams, prompt, vocab, number)
        times["ours"].append(ours.batch(engine, prompts, output))
        times["transformers"].append(library_batch(library, prompts, output))
    # It was made for so many streams, and holds nearly all the memory that was free.
    library.destroy_cached_continuous_batching_manager()
    made = streams * output
    ratios = [theirs / own for own, theirs in zip(times["ours"][1:], times["transformers"][1:])]
    return {
        "streams": streams,
        "ours_tokens_per_s": [made / seconds for seconds in times["ours"][1:]],
        "transformers_tokens_per_s": [made / seconds for seconds in times["transformers"][1:]],
        "ratio": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
        },
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-8b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without our kernels")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tests/bench/gpu.py measures on a CUDA device; torch sees none here")
    shape = shapes.SHAPES[arguments.shape]
    context = max([arguments.prompt + arguments.output, *arguments.prefill]) + 1
    library = library_model(shape, context)
    model = decoder_of(shape, library, context)
    if arguments.plain:
        operations: MakeOperations = Plain()
    else:
        # Not imported above: without a GPU there may be no Triton.
        from llmservices.executor.gpu.kernels.operations import Kernels

        operations = Kernels(model)
    ours = Ours(model, operations)
    limits = ceilings()
    report: dict[str, object] = {
        "arguments": vars(arguments),
        "device": torch.cuda.get_device_name(),
        "ceilings": limits,
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
    }
    with torch.inference_mode():
        report["decode"] = [
            ours.decode(size, arguments.prompt, arguments.output, limits)
            for size in arguments.batches
        ]
        report["prefill"] = [
            ours.prefill(size, arguments.rounds, limits) for size in arguments.prefill
        ]
    if not arguments.alone:
        report["pairs"] = [
            pair(ours, library, size, arguments, shape.vocab) for size in arguments.batches
        ]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
