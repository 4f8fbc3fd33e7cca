"""From settings to an engine that is warm."""

import gc
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from libllm.config import ExecutorConfig
from llmproto.errors import ErrorKind, RemoteError
from llmservices.executor import loader
from llmservices.executor.costs import UNKNOWN_MS, StepCosts
from llmservices.executor.encoding import EncoderEngine
from llmservices.executor.loader import (
    MIXED_STEP_MS_DEFAULT,
    Settings,
    load_engine,
    threads_for,
)
from llmservices.models.loading import load
from llmservices.models.native.bindings import Functions

from tests.services.models.native.memory import is_mapped

from ..encoders import make


def settings(folder: Path, config: ExecutorConfig | None = None) -> Settings:
    config = config or ExecutorConfig(mode="exact", threads=1)
    return Settings("tiny", folder, bytes(16), "cpu0", [0], config)


def test_it_has_computed_and_left_nothing_behind(tiny_folder: Path) -> None:
    plans: list[list[tuple[bytes, int]]] = []
    costs = StepCosts()
    engine = load_engine(settings(tiny_folder), plans.append, costs)
    assert plans[0] == [(bytes(8), 32)]
    assert plans[-1] == []
    assert engine.residencies() == []
    assert engine.blocks_free == engine.blocks
    assert engine.counters.cached_tokens == 0
    assert costs.budget_ms(512) != UNKNOWN_MS
    engine.check()


def test_the_cache_is_no_larger_than_all_contexts(tiny_folder: Path) -> None:
    config = ExecutorConfig(mode="exact", threads=1, residents_max=3)
    engine = load_engine(settings(tiny_folder, config), lambda plan: None)
    assert engine.blocks == 3 * (160 // 16)
    assert engine.config.residents_max == 3


@pytest.mark.parametrize(("said", "kept"), [(None, MIXED_STEP_MS_DEFAULT), (20, 20)])
def test_steps_with_prompts_beside_answers_are_bounded(
    tiny_folder: Path, said: int | None, kept: int
) -> None:
    config = ExecutorConfig(mixed_step_ms=said)
    engine = load_engine(settings(tiny_folder, config), lambda plan: None)
    assert engine.config.mixed_step_ms == kept


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_the_native_step_keeps_nothing_of_the_files(
    functions: Functions,
    tiny_folder: Path,
    tmp_path: Path,
    weights: Literal["auto", "int8", "int4"],
) -> None:
    """Weights are read where the files are mapped, and what is kept is laid out: not twice."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    lent: list[bool] = []

    def lend(*_: object) -> bool:
        lent.append(is_mapped(folder / "model.safetensors"))
        return True

    model = load(folder, device=torch.device("cpu"), lend=lend)
    assert lent == [False]
    assert is_mapped(folder / "model.safetensors")
    del model
    config = ExecutorConfig(threads=1, weights=weights)
    engine = load_engine(settings(folder, config), lambda plan: None)
    assert "native" in engine.path
    gc.collect()
    assert not is_mapped(folder / "model.safetensors")


def test_torch_has_copies_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = ExecutorConfig(threads=1, step="torch")
    engine = load_engine(settings(folder, config), lambda plan: None)
    assert "torch" in engine.path
    gc.collect()
    assert not is_mapped(folder / "model.safetensors")


def test_an_encoder_has_an_engine_of_its_own(tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "encoder")
    plans: list[list[tuple[bytes, int]]] = []
    costs = StepCosts()
    engine = load_engine(settings(folder), plans.append, costs)
    assert isinstance(engine, EncoderEngine)
    assert plans == [[(bytes(8), 0)], [(bytes(8), 0)], []]
    assert engine.residencies() == []
    assert engine.blocks_free == engine.blocks == 257
    assert costs.budget_ms(512) != UNKNOWN_MS
    engine.check()


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize(
    ("weights", "precision"), [("auto", "float32"), ("int8", "int8"), ("int4", "int4")]
)
def test_the_path_names_precision_and_instructions(
    tiny_folder: Path,
    functions: Functions,
    mode: Literal["fast", "exact"],
    weights: Literal["auto", "int8", "int4"],
    precision: str,
) -> None:
    config = ExecutorConfig(mode=mode, weights=weights, threads=2)
    engine = load_engine(settings(tiny_folder, config), lambda plan: None)
    best = functions.llm_isas().decode().split()[0]
    assert engine.path == f"{precision} cpu native {best} {mode}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nobody_gets_less_than_the_checkpoints_precision_unasked(
    tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    """Whatever the configuration leaves open; int8 and int4 are never chosen."""
    assert (ExecutorConfig().dtype, ExecutorConfig().weights) == ("auto", "auto")
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
    engine = load_engine(settings(tmp_path, ExecutorConfig()), lambda plan: None)
    assert engine.path.split()[0] == dtype
    model = load(tmp_path, device=torch.device("cpu"))
    assert model.dtype == getattr(torch, dtype)
    # Two bytes a number at least: no matrix was made narrower under another name.
    held = engine.memory_bytes - engine.blocks * engine.config.block_tokens * model.kv_token_bytes
    assert held >= model.weight_bytes


def test_torch_serves_where_it_is_asked_for(tiny_folder: Path) -> None:
    config = ExecutorConfig(step="torch", threads=1)
    engine = load_engine(settings(tiny_folder, config), lambda plan: None)
    assert engine.path == "float32 cpu torch fast"


def test_torch_serves_where_nothing_was_built_and_says_so(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "open_library", lambda: "native step not built")
    engine = load_engine(settings(tiny_folder), lambda plan: None)
    assert engine.path == "float32 cpu torch exact (native step not built)"


def test_precision_that_cannot_be_had_is_refused(tiny_folder: Path) -> None:
    config = ExecutorConfig(step="torch", weights="int8", threads=1)
    with pytest.raises(RemoteError) as refused:
        load_engine(settings(tiny_folder, config), lambda plan: None)
    assert refused.value.kind is ErrorKind.INVALID
    assert "int8" in refused.value.detail


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as refused:
        load_engine(settings(tmp_path), lambda plan: None)
    assert refused.value.kind is ErrorKind.INVALID
    assert str(tmp_path) in refused.value.detail


@pytest.mark.parametrize(
    ("weight_bytes", "cores", "threads"),
    [
        (7 << 20, 2, 1),
        (64 << 20, 2, 2),
        (1 << 30, 2, 2),
        (1 << 30, 64, 32),
        (16 << 30, 64, 64),
        (1, 0, 1),
    ],
)
def test_a_model_gets_no_more_threads_than_it_can_feed(
    weight_bytes: int, cores: int, threads: int
) -> None:
    assert threads_for(weight_bytes, cores) == threads
