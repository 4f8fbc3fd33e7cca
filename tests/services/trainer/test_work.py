"""Whole runs without a system: what they make, how they go on, why they end.

The store is a real one in a folder, the data service a function.
"""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from llmproto.base import Message
from llmproto.data import Prepare, Prepared, Segment, SegmentAsk, TokenizerMade, TokenizerMake
from llmproto.errors import ErrorKind, RemoteError
from llmproto.jobs import StepReport
from llmproto.recipes import (
    ArchitectureRecipe,
    DataRecipe,
    FinishRecipe,
    LoraRecipe,
    Recipe,
    TrainingRecipe,
)
from llmproto.threads import Done
from llmproto.versions import (
    Digest,
    Import,
    Save,
    Saved,
    TagSet,
    VersionAsk,
    VersionFound,
    VersionKind,
    VersionRow,
)
from llmservices.store.archive import Archive
from llmservices.trainer import work
from llmservices.trainer.finishing import Checkpoint
from llmservices.trainer.pace import Pace
from llmservices.trainer.work import Order, Place, Result, Stopped, Work
from llmservices.versions.manifest import folder_of, read_manifest
from llmservices.versions.weights import VersionTensors, read_tensors
from transformers import BertConfig, BertModel

VOCABULARY = 32
SEGMENT_BATCHES = 4
MessageT = TypeVar("MessageT", bound=Message)


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in shared memory by those that are killed."""
    monkeypatch.setattr(work, "folder_for", lambda length, run: run)


class Death(BaseException):
    """The process is killed."""


class Asked(Future[Digest]):
    """An answer that counts as come when it has been waited for."""

    def __init__(self, version: Digest) -> None:
        super().__init__()
        self.is_waited_for = False
        self.set_result(version)

    def result(self, timeout: float | None = None) -> Digest:
        self.is_waited_for = True
        return super().result(timeout)


class World:
    """What the step thread talks to.  `dies_at` is a step whose report kills it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archive = Archive(folder / "store")
        self.reports: list[StepReport] = []
        self.said: list[str] = []
        self.committed: tuple[Digest, int] | None = None
        self.asked: Asked | None = None
        self.saves: list[Save] = []
        self.blobs: list[tuple[bytes, ...]] = []
        self.tags: list[TagSet] = []
        self.dies_at: int | None = None
        self.poison: int | None = None
        """A batch whose labels are so that the loss explodes."""
        self.moves = 0
        self.tokenizer = b"{}"
        self.batches = 6

    # --- the bus ----------------------------------------------------------------------------------

    def ask(
        self,
        message: Message,
        answer: type[MessageT],
        *,
        target: str,
        blobs: tuple[bytes, ...] = (),
    ) -> MessageT:
        found = self._answer(message, blobs)
        assert isinstance(found, answer)
        return found

    def _answer(self, message: Message, blobs: tuple[bytes, ...]) -> Message:
        match message:
            case TokenizerMake():
                made = Path(message.output)
                made.mkdir(exist_ok=True)
                (made / "tokenizer.json").write_bytes(self.tokenizer)
                return TokenizerMade(str(made), VOCABULARY, 0, 1)
            case Prepare():
                self.prepare = message
                return self._prepared(message)
            case SegmentAsk():
                return self._segment(message)
            case VersionAsk():
                return VersionFound(self._row(bytes.fromhex(message.reference.removeprefix("@"))))
            case Import():
                return self.archive.import_folder(Path(message.path), message.name, None)
            case Save():
                assert message.kind is VersionKind.MODEL
                return self.save_now(message, blobs)
            case TagSet():
                self.tags.append(message)
                return Done()
            case _:
                raise AssertionError(message)

    def report(self, report: StepReport, *, steps_total: int) -> None:
        if report.step == self.dies_at:
            raise Death
        self.reports.append(report)

    def doing(self, what: str) -> None:
        self.said.append(what)

    def moved(self) -> None:
        self.moves += 1

    def save(self, checkpoint: Checkpoint) -> "Future[Digest]":
        checkpoint.buffer.settle()
        saved = self.save_now(checkpoint.save, checkpoint.blobs)
        self.committed = (saved.version, checkpoint.step)
        self.asked = Asked(saved.version)
        return self.asked

    def save_now(self, save: Save, blobs: tuple[bytes, ...]) -> Saved:
        assert self.asked is None or self.asked.is_waited_for, "two saves at once"
        self.saves.append(save)
        self.blobs.append(blobs)
        return self.archive.save(save, blobs)

    # --- the store --------------------------------------------------------------------------------

    def path(self, version: Digest) -> Path:
        return folder_of(self.archive.root, version)

    def _row(self, version: Digest) -> VersionRow:
        manifest, _ = read_manifest(self.path(version))
        return VersionRow(
            version=version,
            reference=f"{manifest.name}@{version.hex()[:8]}",
            name=manifest.name,
            kind=VersionKind(manifest.kind),
            path=str(self.path(version)),
            created_s=0,
            bytes=0,
            bytes_own=0,
            tags=[],
            lineage=manifest.lineage.message(),
            metrics=manifest.metrics,
            adapter=manifest.is_adapter,
        )

    # --- the data ---------------------------------------------------------------------------------

    def _prepared(self, asked: Prepare) -> Prepared:
        labels = ["bad", "good"] if asked.task == "classify" else []
        rows = self.batches * asked.batch
        return Prepared(
            bytes(32), "d" * 64, rows, self.batches, rows * 8, SEGMENT_BATCHES, {}, labels
        )

    def _segment(self, asked: SegmentAsk) -> Segment:
        path = self.folder / f"segment-{asked.index}.arrow"
        first = asked.index * SEGMENT_BATCHES
        records = [self.record(first + each) for each in range(SEGMENT_BATCHES)]
        with pa.ipc.new_file(str(path), records[0].schema) as writer:
            for record in records:
                writer.write_batch(record)
        return Segment(str(path), bytes(32), path.stat().st_size)

    def record(self, position: int) -> pa.RecordBatch:
        """Batch `position`: a pure function of it."""
        asked = self.prepare
        rng = np.random.default_rng(position)
        lengths = rng.integers(3, 12, asked.batch)
        ids = [rng.integers(2, VOCABULARY, length).astype(np.int32) for length in lengths]
        if asked.task == "generate":
            labels = [np.append(row[1:], np.int32(-100)).astype(np.int32) for row in ids]
            if position == self.poison:
                labels = [np.full_like(row, -1) for row in ids]
        else:
            labels = [np.array([int(row[0]) % 2], np.int32) for row in ids]
        columns = {
            "ids": pa.array(ids, pa.list_(pa.int32())),
            "labels": pa.array(labels, pa.list_(pa.int32())),
            "lengths": pa.array([[len(row)] for row in ids], pa.list_(pa.int32())),
        }
        if asked.task == "regress":
            columns["value"] = pa.array([float(row[0]) for row in ids], pa.float32())
        return pa.record_batch(columns)

    # --- runs -------------------------------------------------------------------------------------

    def work(self, recipe: Recipe, *, attempt: int = 1, pace: Pace | None = None) -> Work:
        """The next attempt, from what is committed."""
        self.asked = None
        step = self.committed[1] if self.committed else 0
        order = Order(
            job=bytes(8),
            attempt=attempt,
            name=recipe.name,
            recipe=recipe,
            rank=0,
            processes=1,
            rendezvous=self.folder / "rendezvous",
            checkpoint=self.committed[0] if self.committed else None,
            reported=[report for report in self.reports if report.step > step],
        )
        place = Place(torch.device("cpu"), 1, self.folder)
        return Work(order, place, self, pace or Pace())

    def run(self, recipe: Recipe) -> Result:
        """Undisturbed."""
        return self.work(recipe).run()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def pretraining(**changes: object) -> Recipe:
    """A tiny run from nothing."""
    training = TrainingRecipe(
        steps=6, batch=6, learning_rate=1e-2, warmup_steps=2, checkpoint_every=2
    )
    return Recipe(
        "tiny",
        method="pretrain",
        model=ArchitectureRecipe(
            layers=2, heads=2, width=16, context_tokens=16, dropout=0.1, family="gpt2"
        ),
        training=msgspec.structs.replace(training, **changes),
    )


def write_bert(folder: Path) -> Path:
    """A plain folder of a tiny BERT without a head."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


def losses(world: World) -> dict[int, float]:
    return {report.step: report.loss for report in world.reports}


def tuning(base: Path, method: str, task: str = "classify") -> Recipe:
    return Recipe(
        "judge",
        method=method,  # type: ignore[arg-type]  # one of its words
        task=task,  # type: ignore[arg-type]  # one of its words
        base=str(base),
        data=DataRecipe(validation=["x"]),
        lora=LoraRecipe(rank=2),
        training=TrainingRecipe(
            steps=4, batch=6, learning_rate=1e-2, checkpoint_every=2, validate_every=2
        ),
        finish=FinishRecipe(tags=["prod"], evaluate=["f1"] if task == "classify" else ["spearman"]),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes | None, dict[int, float]]:
    world = World(tmp_path_factory.mktemp("undisturbed"))
    version = world.run(pretraining()).version
    return version, losses(world)


@pytest.mark.parametrize("step", range(1, 7))
def test_killed_at_any_step_it_goes_on_exactly(
    world: World, undisturbed: tuple[bytes | None, dict[int, float]], step: int
) -> None:
    world.dies_at = step
    with pytest.raises(Death):
        world.work(pretraining()).run()
    assert (world.committed[1] if world.committed else 0) == (step - 1) // 2 * 2
    world.dies_at = None
    result = world.work(pretraining(), attempt=2).run()
    assert (result.version, losses(world)) == undisturbed


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", ["classify", "regress"])
def test_tuning_goes_on_exactly(tmp_path: Path, bert: Path, method: str, task: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    recipe = tuning(bert, method, task)
    whole, cut = World(tmp_path / "a"), World(tmp_path / "b")
    expected = whole.run(recipe)
    assert expected.version is not None
    assert [tag.tag for tag in whole.tags] == ["prod"]
    named = "accuracy" if task == "classify" else "spearman"
    assert {"train_loss", "validation_loss", named} <= expected.metrics.keys()
    cut.dies_at = 4
    with pytest.raises(Death):
        cut.work(recipe).run()
    cut.dies_at = None
    assert cut.work(recipe, attempt=2).run().version == expected.version
    with VersionTensors(whole.path(expected.version)) as tensors:
        assert "classifier.weight" in tensors


def test_an_adapter_leaves_its_base_alone(world: World, bert: Path) -> None:
    result = world.run(tuning(bert, "lora"))
    assert result.version is not None
    saved = [group.file for group in world.saves[-1].groups]
    assert saved == ["adapter_model.safetensors", "losses.safetensors"]
    names = [place.name for place in world.saves[-1].groups[0].tensors]
    assert all(".lora_" in name or ".classifier." in name for name in names)
    assert not any("pooler" in name for name in names)


def test_a_step_that_comes_out_otherwise_ends_the_job(world: World) -> None:
    world.dies_at = 4
    with pytest.raises(Death):
        world.work(pretraining()).run()
    world.dies_at = None
    wrong = msgspec.structs.replace(world.reports[2], loss=world.reports[2].loss + 1e-12)
    world.reports[2] = wrong
    with pytest.raises(RemoteError) as caught:
        world.work(pretraining(), attempt=2).run()
    assert caught.value.kind is ErrorKind.INTERNAL
    assert repr(wrong.loss) in caught.value.detail and "step 3" in caught.value.detail


def test_under_another_contract_differences_are_reported(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.dies_at = 4
    with pytest.raises(Death):
        world.work(pretraining()).run()
    world.dies_at = None
    world.reports[2] = msgspec.structs.replace(
        world.reports[2], loss=world.reports[2].loss + 2.0**-10
    )
    monkeypatch.setattr(torch, "__version__", "9.9")
    world.work(pretraining(), attempt=2).run()
    again = next(report for report in world.reports[3:] if report.step == 3)
    assert again.difference == pytest.approx(2.0**-10)
    assert any("another numerics contract: torch" in said for said in world.said)


def test_changed_data_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.dies_at = 4
    with pytest.raises(Death):
        world.work(pretraining()).run()
    before = world._prepared
    monkeypatch.setattr(
        world, "_prepared", lambda a: msgspec.structs.replace(before(a), plan=b"\x01" * 32)
    )
    with pytest.raises(RemoteError, match="the data has changed since the checkpoint of step 2"):
        world.work(pretraining(), attempt=2).run()


def test_told_to_leave_it_saves_and_goes_on_elsewhere(
    world: World, undisturbed: tuple[bytes | None, dict[int, float]]
) -> None:
    pace = Pace()
    report = world.report

    def stopping(*arguments: object, **named: object) -> None:
        report(*arguments, **named)  # type: ignore[arg-type]  # as it came
        if len(world.reports) == 3:
            pace.set(1.0, stop=True)

    world.report = stopping  # type: ignore[method-assign]  # a spy
    with pytest.raises(Stopped):
        world.work(pretraining(), pace=pace).run()
    assert world.committed is not None and world.committed[1] == 3
    world.report = report  # type: ignore[method-assign]  # the spy goes
    assert world.work(pretraining(), attempt=2).run().version is not None
    assert losses(world) == undisturbed[1]


def test_every_loss_stands_in_the_version(world: World) -> None:
    version = world.run(pretraining()).version
    assert version is not None
    columns = read_tensors(world.path(version), "losses.safetensors")
    assert columns["loss"].tolist() == [report.loss for report in world.reports]
    assert columns["step"].tolist() == list(range(1, 7))


def test_a_tokenizer_that_no_message_holds_goes_with_every_version(world: World) -> None:
    world.tokenizer = b'"' + b"x" * (2 << 20) + b'"'
    version = world.run(pretraining()).version
    assert version is not None
    sizes = [sum(map(len, blobs)) for blobs in world.blobs]
    assert len(sizes) == 3 and max(sizes) < 256 << 10
    for digest in (version, world.committed and world.committed[0]):
        assert digest is not None
        assert (world.path(digest) / "tokenizer.json").read_bytes() == world.tokenizer
    assert not list(world.folder.glob("llmos-save-*"))


def test_the_store_is_told_how_many_checkpoints_stay(world: World) -> None:
    world.run(pretraining(keep_checkpoints=3))
    kept = [save.keep for save in world.saves if save.kind is VersionKind.CHECKPOINT]
    assert kept == [3, 3]


def diverging(**changes: object) -> Recipe:
    """The weights are beyond all measure after the first update that is not warm-up."""
    return pretraining(steps=12, learning_rate=1e30, optimizer="sgd", warmup_steps=6, **changes)


def test_divergence_ends_the_job(world: World) -> None:
    with pytest.raises(RemoteError, match="training diverged: step 3") as caught:
        world.run(diverging())
    assert caught.value.kind is ErrorKind.INTERNAL


def test_divergence_goes_back_thrice_at_half_the_rate(world: World) -> None:
    with pytest.raises(RemoteError, match="after 3 roll-backs"):
        world.run(diverging(on_divergence="rollback", checkpoint_every=1))
    assert sum(said.startswith("rolled back") for said in world.said) == 3
    steps = [report.step for report in world.reports]
    assert steps == sorted(set(steps))  # what is reported is never reported again


def test_early_stopping(world: World) -> None:
    recipe = pretraining(validate_every=1, stop_early_after=2, learning_rate=0.0)
    recipe = msgspec.structs.replace(recipe, data=DataRecipe(validation=["x"]))
    world.run(recipe)
    assert len(world.reports) == 3  # the first is the best, two are no better


def test_the_best_validated_weights_are_published(tmp_path: Path) -> None:
    """Also where the process died since they were there."""
    validating = DataRecipe(validation=["x"])
    found: list[bytes | None] = []
    last = 0
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
        world = World(tmp_path / folder)
        # Steps so long that they soon lead away again.
        recipe = pretraining(
            steps=40, validate_every=1, stop_early_after=3, schedule="constant", learning_rate=0.1
        )
        recipe = msgspec.structs.replace(recipe, data=validating)
        if last:
            world.dies_at = last
            with pytest.raises(Death):
                world.run(recipe)
            assert world.committed is not None and world.committed[1] > last - 3
            world.dies_at = None
        result = world.run(recipe)
        last = len(world.reports)
        validated = {report.step: report.metrics["loss"] for report in world.reports}
        best = min(validated, key=validated.__getitem__)
        assert best == last - 3 and f"those of step {best}" in result.detail
        assert result.metrics["validation_loss"] == validated[best]
        assert result.metrics["train_loss"] == world.reports[best - 1].loss
        assert world.saves[-1].lineage.step == best
        found.append(result.version)
        # A run that ends there makes the same weights.
        (tmp_path / f"{folder}-short").mkdir()
        short = World(tmp_path / f"{folder}-short")
        steps = msgspec.structs.replace(recipe.training, steps=best, stop_early_after=None)
        version = short.run(msgspec.structs.replace(recipe, training=steps)).version
        assert version is not None and result.version is not None
        expected = read_tensors(short.path(version), "model.safetensors")
        weights = read_tensors(world.path(result.version), "model.safetensors")
        assert all(torch.equal(weights[name], each) for name, each in expected.items())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": TrainingRecipe(optimizer="lion")}, "there are adadelta"),
        ({"training": TrainingRecipe(epochs=1, steps=2)}, "give one of them"),
        ({"training": TrainingRecipe(context_tokens=99)}, "at most 32"),
        ({"base": None}, "needs a base"),
        ({"base": "/no/such/folder"}, "no folder /no/such/folder"),
        ({"task": "generate", "finish": FinishRecipe()}, "does not generate"),
        ({"lora": LoraRecipe(targets=["q_proj"])}, "linear layers of this model are"),
        ({"finish": FinishRecipe(evaluate=["bleu"])}, "finish.evaluate names bleu"),
        ({"method": "pretrain"}, "leave base out"),
    ],
)
def test_bad_recipes(world: World, bert: Path, change: dict[str, object], said: str) -> None:
    recipe = msgspec.structs.replace(tuning(bert, "lora"), **change)
    with pytest.raises(RemoteError, match=said) as caught:
        world.run(recipe)
    assert caught.value.kind is ErrorKind.INVALID


def test_families_that_begin_from_nothing(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        (tmp_path / family).mkdir()
        world = World(tmp_path / family)
        recipe = msgspec.structs.replace(
            pretraining(steps=1),
            model=ArchitectureRecipe(family=family, layers=1, heads=2, width=16, context_tokens=16),
        )
        version = world.run(recipe).version
        assert version is not None
        with VersionTensors(world.path(version)) as tensors:
            assert len(tensors.names) > 5


def test_accumulation_gives_the_same_step(tmp_path: Path) -> None:
    found = []
    for micro in (None, 2, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        world = World(folder)
        recipe = pretraining(micro_batch=micro, steps=3)
        assert recipe.model is not None
        still = msgspec.structs.replace(recipe.model, dropout=0.0)
        world.run(msgspec.structs.replace(recipe, model=still))
        found.append([report.loss for report in world.reports])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)
