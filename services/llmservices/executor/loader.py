"""From what the kernel granted and the configuration says to an engine with a model in it."""

import time
from pathlib import Path

import msgspec
import torch
from libllm.config import ExecutorConfig
from llmproto import limits
from llmproto.errors import invalid
from llmproto.generation import Sampling

from llmservices.executor.contract import Admission, EngineConfig, PlanHook
from llmservices.executor.core import Engine
from llmservices.executor.costs import StepCosts
from llmservices.executor.encoding import EncoderEngine
from llmservices.models.decoder import Decoder
from llmservices.models.encoder import Encoder, EncoderModel
from llmservices.models.foreign import ForeignEncoder
from llmservices.models.loading import Lend, Model, load
from llmservices.models.native.bindings import Functions, open_library
from llmservices.models.native.decoder import NativeDecoder, refusal
from llmservices.models.native.packing import Packer
from llmservices.models.spec import DecoderSpec

KV_BYTES_DEFAULT = 1 << 30
RESIDENTS_MAX_DEFAULT = 128
STEP_TOKENS_DEFAULT = 512
STEP_TOKENS_GPU_DEFAULT = 2048
"""A GPU's products are no longer bound by reading the weights, and few steps are cut in two."""
MIXED_STEP_MS_DEFAULT = 75
"""Three quarters of what MLPerf's Llama-3.1-8B server scenario allows for a further token."""
KV_SHARE_GPU_DEFAULT = 0.8
"""Of the memory that is free beside the weights; graphs and activations take from the rest."""
BLOCK_TOKENS = 16
ENCODER_STEP_TOKENS_DEFAULT = 2048
"""A fraction of a second for the usual models; more saves nothing that can be measured."""
WARM_UP_TOKENS = 32
THREAD_WEIGHT_BYTES = 32 << 20
"""Weights read in a step for each further thread: for less, waiting for one another costs more than
the work (and much more where another process has one of the cores)."""


class Settings(msgspec.Struct, frozen=True):
    """What one executor is to be."""

    model: str
    path: Path
    digest: bytes
    device: str
    """Name of the leased device: `cpu...` or `cuda:N`."""
    cores: list[int]
    config: ExecutorConfig


def load_engine(
    settings: Settings, on_plan: PlanHook, costs: StepCosts | None = None
) -> Engine | EncoderEngine:
    """Load, size the cache, and compute, so that the first request does not pay for it, and that it
    is known what a step costs (added to `costs`).

    Raises RemoteError where the folder is not a model that can run here.
    """
    config = settings.config
    torch.set_num_threads(max(1, len(settings.cores)))
    device = torch.device(settings.device if settings.device.startswith("cuda") else "cpu")
    functions = open_library() if config.step == "auto" else "torch was asked for"
    model = load(settings.path, dtype=config.dtype, device=device, lend=_lend(functions))
    model, instead = _laid_out(model, functions, settings)
    costs = StepCosts() if costs is None else costs
    residents_max = config.residents_max or RESIDENTS_MAX_DEFAULT
    if isinstance(model, Encoder | ForeignEncoder):
        return _encoder_engine(model, settings, on_plan, costs)
    threads = config.threads or threads_for(model.weight_bytes, len(settings.cores))
    # The native step has threads of its own, whom torch's must not keep from their cores.
    torch.set_num_threads(1 if isinstance(model, NativeDecoder) else threads)
    engine = Engine(
        model,
        EngineConfig(
            kv_bytes=_kv_bytes(model, config, residents_max),
            block_tokens=BLOCK_TOKENS,
            residents_max=residents_max,
            step_tokens=config.step_tokens or _step_tokens(device),
            mixed_step_ms=config.mixed_step_ms or MIXED_STEP_MS_DEFAULT,
            exact=config.mode == "exact",
            threads=threads,
        ),
        on_plan=on_plan,
    )
    if instead is not None:
        engine.path += f" ({instead})"
    _warm_up(engine, on_plan, costs)
    return engine


def _encoder_engine(
    model: EncoderModel, settings: Settings, on_plan: PlanHook, costs: StepCosts
) -> EncoderEngine:
    config, cores = settings.config, len(settings.cores)
    residents_max = config.residents_max or RESIDENTS_MAX_DEFAULT
    # Cores share a step by its inputs, not by its operations.
    workers = 1 if model.device.type == "cuda" else config.threads or max(1, cores)
    torch.set_num_threads(1)
    engine = EncoderEngine(
        model,
        EngineConfig(
            # The kernel counts blocks; calls need none, so each takes one of more than enough.
            blocks=2 * residents_max + 1,
            block_tokens=limits.CONTEXT_TOKENS_MAX + 1,
            residents_max=residents_max,
            step_tokens=config.step_tokens or ENCODER_STEP_TOKENS_DEFAULT,
            exact=config.mode == "exact",
        ),
        on_plan=on_plan,
        workers=workers,
    )
    tokens = min(WARM_UP_TOKENS, engine.context_tokens)
    for size in (1, 4):
        engine.add(
            Admission(
                thread=bytes(8),
                residency=0,
                tokens=[0] * (tokens * size),
                prompt_tokens=tokens * size,
                output_tokens_max=0,
                lengths=[tokens] * size,
            )
        )
        began_s = time.monotonic()
        engine.step()
        costs.add(tokens * size, time.monotonic() - began_s)
        engine.drop(0)
    on_plan([])
    return engine


def _lend(functions: Functions | str) -> Lend:
    """Whether the native step will compute a model, so that its weights are only read once."""

    def lend(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> bool:
        return not isinstance(functions, str) and refusal(spec, dtype, device) is None

    return lend


def _laid_out(
    model: Model, functions: Functions | str, settings: Settings
) -> tuple[Model, str | None]:
    """The model for the native step where that can serve; else itself, with the reason.

    Raises RemoteError where weights are wanted that only the native step has.
    """
    if isinstance(model, Encoder | ForeignEncoder):
        return model, None  # the precision is that of what generates
    config = settings.config
    reason: str | None = None
    if config.step == "auto" and isinstance(model, Decoder):
        reason = refusal(model.spec, model.dtype, model.device)
        if isinstance(functions, str):
            reason = reason or functions
        elif reason is None:
            packer = Packer(functions, max(1, len(settings.cores)), forgets=True)
            return NativeDecoder(model, config.weights, packer), None
    if config.weights != "auto":
        raise invalid(
            f"[executor] weights = {config.weights!r} needs the native step: "
            f"{reason or 'it is not used for this model'}"
        )
    return model, reason


def threads_for(weight_bytes: int, cores: int) -> int:
    """Threads of the processor for one step: no more than the model can feed.

    A function of model and lease alone: `exact` holds for a fixed number of threads.
    """
    return max(1, min(cores, weight_bytes // THREAD_WEIGHT_BYTES))


def _step_tokens(device: torch.device) -> int:
    return STEP_TOKENS_GPU_DEFAULT if device.type == "cuda" else STEP_TOKENS_DEFAULT


def _kv_bytes(model: Model, config: ExecutorConfig, residents_max: int) -> int:
    """What was granted, and no more than all residents can ever fill."""
    kv_bytes = config.kv_bytes or KV_BYTES_DEFAULT
    if config.kv_bytes is None and model.device.type == "cuda":
        kv_bytes = int(KV_SHARE_GPU_DEFAULT * torch.cuda.mem_get_info(model.device)[0])
    most = residents_max * -(-model.context_tokens // BLOCK_TOKENS)
    return min(kv_bytes, most * BLOCK_TOKENS * model.kv_token_bytes)


def _warm_up(engine: Engine, on_plan: PlanHook, costs: StepCosts) -> None:
    """One prefill and one decode of a thread that nobody asked for.  They pay for what is made
    once, so the first steps are thought slower than they are: that is only patience."""
    tokens = min(WARM_UP_TOKENS, engine.context_tokens - 2)
    if tokens < 1:
        return
    engine.add(
        Admission(
            thread=bytes(8),
            residency=0,
            tokens=[0] * tokens,
            prompt_tokens=tokens,
            output_tokens_max=2,
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            domain=bytes(16),
        )
    )
    for _ in range(2):
        before, began_s = engine.counters.rows, time.monotonic()
        engine.step()
        costs.add(engine.counters.rows - before, time.monotonic() - began_s)
    engine.drop(0)
    # On a GPU a step is still under way, and what it did wrong would only be seen at the next one.
    while engine.runnable():
        engine.step()
    on_plan([])
