"""A trained model's greedy continuation, token for token as the reference implementation writes
it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llmproto.generation import Sampling
from llmservices.executor.contract import Admission, EngineConfig
from llmservices.executor.core import Engine
from llmservices.executor.runner import PagedRunner, Work
from llmservices.models.decoder import Decoder
from llmservices.models.loading import load
from llmservices.models.native.bindings import Functions
from llmservices.models.native.decoder import NativeDecoder
from llmservices.models.native.packing import Packer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[4] / "shared/assets/models/stories260k-llama"
OUTPUT_TOKENS = 200

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the stories260k model")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = load(FOLDER, device=torch.device("cpu"))
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="module")
def native_model(functions: Functions) -> NativeDecoder:
    plain = load(FOLDER, device=torch.device("cpu"))
    assert isinstance(plain, Decoder)
    return NativeDecoder(plain, "auto", Packer(functions, 1))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    ids: list[int] = (
        Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode("Once upon a time").ids
    )
    assert ids[0] == 1
    return ids


@pytest.fixture(scope="module")
def reference(prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """(output ids, logits of every position from the last of the prompt on)."""
    # Any: the library's types do not let `generate` be called.
    other: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = other.generate(torch.tensor([prompt]), max_new_tokens=OUTPUT_TOKENS, do_sample=False)
    with torch.inference_mode():
        logits = other(ids).logits[0, len(prompt) - 1 : -1]
    return ids[0, len(prompt) :].tolist(), logits


def test_no_choice_was_close(
    model: Decoder, prompt: list[int], reference: tuple[list[int], torch.Tensor]
) -> None:
    """Token equality means something: the smallest margin is far above the difference of the
    logits."""
    output, theirs = reference
    everything = torch.tensor(prompt + output[:-1]).numpy()
    for exact in (True, False):
        runner = PagedRunner(model, blocks=32, block_tokens=16, exact=exact)
        with torch.inference_mode():
            ours = runner.compute([Work(1, everything, 0, range(32), "all")])
        assert ours is not None
        difference = float((ours[len(prompt) - 1 :] - theirs).abs().max())
        best = theirs.topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        assert margin > 100 * difference, f"margin {margin}, difference {difference}"


@pytest.mark.parametrize("path", ["exact", "fast", "native"])
@pytest.mark.parametrize("case", ["alone", "chunked", "cached", "crowded"])
def test_the_reference_tokens(
    model: Decoder,
    request: pytest.FixtureRequest,
    prompt: list[int],
    reference: tuple[list[int], torch.Tensor],
    path: str,
    case: str,
) -> None:
    computed: Decoder | NativeDecoder = (
        request.getfixturevalue("native_model") if path == "native" else model
    )
    config = EngineConfig(
        blocks=600,
        block_tokens=4 if case == "cached" else 16,
        step_tokens=3 if case == "chunked" else 64,
        exact=path == "exact",
    )
    engine = Engine(computed, config)
    if case == "cached":
        engine.add(_greedy(1, [*prompt, 5], 1))
        _run(engine)
    if case == "crowded":
        for residency in range(100, 132):
            text = prompt[: 1 + residency % len(prompt)]
            engine.add(
                Admission(
                    thread=bytes(8),
                    residency=residency,
                    tokens=text,
                    prompt_tokens=len(text),
                    output_tokens_max=OUTPUT_TOKENS - 3 * (residency % 20),
                    sampling=Sampling(seed=residency),
                )
            )
        for _ in range(5):
            _commit(engine)
    engine.add(_greedy(2, prompt, OUTPUT_TOKENS))
    assert _run(engine)[2] == reference[0]
    assert engine.counters.cached_tokens == (4 if case == "cached" else 0)


def _greedy(residency: int, prompt: list[int], output: int) -> Admission:
    return Admission(
        thread=bytes(8),
        residency=residency,
        tokens=prompt,
        prompt_tokens=len(prompt),
        output_tokens_max=output,
        sampling=Sampling(temperature=0.0, stop_tokens=[2]),
    )


def _commit(engine: Engine) -> dict[int, int]:
    tokens = {}
    for row in engine.step().rows:
        assert row.token is not None
        tokens[row.residency] = row.token
        engine.watermark(row.residency, row.position)
    return tokens


def _run(engine: Engine) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while engine.runnable():
        for residency, token in _commit(engine).items():
            tokens.setdefault(residency, []).append(token)
    return tokens
