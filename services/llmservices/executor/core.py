"""The executor's core: one model, its KV blocks, and the threads that are resident on it.

Owns the order of a step: plan, tell the hook, forward, sample, propose.  On a GPU a step is started
before the one before it has been waited for: its tokens are then proposed by the next call, and
until then stand as `UNKNOWN` at the end of their threads.  Knows no socket and no clock.  Not
thread-safe: one caller at a time.  Errors that are a caller's are `RemoteError`; a thread that
fails inside a step comes back in `StepResult.failed` and hurts no other.
"""

import numpy as np
import torch
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError, invalid
from llmproto.generation import TokenScore

from llmservices.executor.blocks import BlockTable
from llmservices.executor.contract import (
    END_LENGTH,
    END_NONE,
    END_STOP,
    Admission,
    Computed,
    Counters,
    EngineConfig,
    Failure,
    PlanHook,
    Proposal,
    StepResult,
)
from llmservices.executor.foreign import ForeignRunner
from llmservices.executor.gpu.flight import Flight
from llmservices.executor.gpu.opening import open_runner
from llmservices.executor.gpu.runner import GpuRunner
from llmservices.executor.native import NativeRunner
from llmservices.executor.planner import Candidate, Chunk, Plan, plan
from llmservices.executor.resident import UNKNOWN, Resident
from llmservices.executor.runner import PagedRunner, Runner, Work
from llmservices.executor.sampler import Ask, Choice, Sampler, score
from llmservices.models.decoder import Decoder
from llmservices.models.foreign import ForeignModel
from llmservices.models.loading import Model
from llmservices.models.native.decoder import NativeDecoder

SCORED_ROWS_MAX = 64
"""Rows of a prompt that is scored in one step: each needs logits over the whole vocabulary."""


class Engine:
    """Continuous batching over one model.

    Invariant: a thread is never more than `limits.STEPS_AHEAD_MAX` positions beyond its
    watermark; every proposal beyond the watermark is remembered until the thread is dropped,
    given back or has failed.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        on_plan: PlanHook | None = None,
        runner: Runner | None = None,
    ) -> None:
        """`on_plan` gets [(thread, position)] of each step, position being the one that it works
        for, after the plan is made and before anything is computed; threads of the step that is
        under way are named again.  `runner`: another one than the model has by itself."""
        self._config = config
        self._on_plan = on_plan
        self.blocks = config.blocks or _blocks_of(config, model)
        self.context_tokens = min(model.context_tokens, self.blocks * config.block_tokens)
        self._model_tokens = model.context_tokens
        self._vocab_tokens = model.vocab_tokens
        self._runner = runner or _runner(model, self.blocks, config)
        self._gpu = self._runner if isinstance(self._runner, GpuRunner) else None
        self.memory_bytes = model.weight_bytes + self._runner.cache_bytes
        self.path = _path(model, self._runner, config)
        self.counters = Counters()
        self._table = BlockTable(self.blocks, config.block_tokens)
        drawer = self._runner if isinstance(self._runner, NativeRunner) else None
        self._sampler = Sampler(model.vocab_tokens, model.device, drawer)
        self._flight: Flight | None = None
        """The step that was started and whose tokens are not known yet."""
        self._residents: dict[int, Resident] = {}
        self._age = 0
        self._waiting: tuple[int, int, int] | None = None
        """`Plan.waiting` of the last step."""
        self._stuck = False
        """Planning found nothing to do, and nothing has changed since."""

    @property
    def config(self) -> EngineConfig:
        """The sizes that it was made with."""
        return self._config

    # --- the table of threads -------------------------------------------------------------------

    def add(self, admission: Admission) -> None:
        """Take a thread.

        INVALID: it can never fit alone (blocks needed for its prompt and output against blocks
        that exist; tokens against the context), or an id is out of range; EXHAUSTED:
        `residents_max` reached; STALE: its residency is resident already.
        """
        if admission.residency in self._residents:
            raise RemoteError(ErrorKind.STALE, f"residency {admission.residency} is resident")
        if len(self._residents) >= self._config.residents_max:
            raise RemoteError(
                ErrorKind.EXHAUSTED,
                f"{len(self._residents)} threads are resident, the most this executor takes",
                retry_after_ms=limits.RUN_RESEND_MS,
            )
        self._refuse(admission)
        self._age += 1
        self._residents[admission.residency] = Resident(admission, age=self._age)
        self._stuck = False

    def _refuse(self, admission: Admission) -> None:
        """INVALID for a thread that can never run here."""
        tokens = len(admission.tokens)
        if admission.lengths:
            raise invalid(f"{len(admission.lengths)} inputs for vectors; this model generates text")
        if not 1 <= admission.prompt_tokens <= tokens:
            raise invalid(f"{admission.prompt_tokens} prompt tokens of {tokens} tokens in all")
        ids = np.asarray(admission.tokens)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_tokens:
            worst = low if low < 0 else high
            raise invalid(
                f"token id {worst}; the model's vocabulary ends at {self._vocab_tokens - 1}"
            )
        room = self._model_tokens - (1 if admission.output_tokens_max else 0)
        if tokens > room:
            raise invalid(
                f"{tokens} tokens leave no room in the model's context of {self._model_tokens}"
            )
        whole = min(admission.prompt_tokens + admission.output_tokens_max, self._model_tokens)
        needed = -(-max(whole, tokens) // self._config.block_tokens)
        if needed > self.blocks:
            raise invalid(
                f"{admission.prompt_tokens} prompt and up to {admission.output_tokens_max} output "
                f"tokens need {needed} KV blocks of {self._config.block_tokens} tokens; "
                f"this executor has {self.blocks} ({self.context_tokens} tokens)"
            )

    def drop(self, residency: int) -> None:
        """Forget a residency and free its blocks; unknown ones are ignored."""
        resident = self._residents.pop(residency, None)
        if resident is not None:
            self._release(resident)

    def watermark(self, residency: int, position: int) -> None:
        """Every position up to this one is committed.  Never goes back; unknown residencies are
        ignored."""
        resident = self._residents.get(residency)
        if resident is not None:
            resident.commit(position)
            self._stuck = False

    def proposals_after(self, residency: int, position: int) -> list[Proposal]:
        """What was proposed beyond `position` and is not under the watermark, oldest first, to
        be sent again."""
        resident = self._residents.get(residency)
        if resident is None:
            return []
        return [row for row in resident.proposals if row.position > position]

    def computed(self, residency: int) -> list[Computed]:
        """A causal model has no vectors."""
        return []

    def residencies(self) -> list[int]:
        """All that are held, ended ones that were not dropped included."""
        return list(self._residents)

    def runnable(self) -> bool:
        """Whether `step` may do something now; else only add, drop or watermark changes that."""
        if self._flight is not None:
            return True
        return not self._stuck and any(self._allowed(r) for r in self._residents.values())

    @property
    def blocks_free(self) -> int:
        """Blocks that no thread holds; those that remember prefixes included."""
        return self._table.available

    def check(self) -> None:
        """Assert every invariant of the tables."""
        for resident in self._residents.values():
            resident.check()
        self._table.check([resident.chain for resident in self._residents.values()])

    # --- the step ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, beside_tokens: int | None = None) -> StepResult:
        """Plan and compute one step, with no more than `beside_tokens` of prompts beside decodes.
        Without anything to do: an empty result."""
        self._share()
        planned = self._plan(beside_tokens)
        self._waiting = planned.waiting
        before, self._flight = self._flight, None
        self._stuck = not planned.chunks and not planned.give_back and before is None
        if self._on_plan is not None and (planned.chunks or before is not None):
            self._on_plan(self._suspects(planned.chunks, before))
        gave_back = [self._give_back(residency) for residency in planned.give_back]
        rows: list[Proposal] = []
        failed: list[Failure] = []
        flight = self._launch(planned.chunks) if planned.chunks else None
        if before is not None:
            self._land(before, rows, failed)
        if flight is not None and flight.drawn is not None:
            self._flight = flight
        elif flight is not None:
            self._land(flight, rows, failed)
        return StepResult(rows, gave_back, failed, self._table.available)

    def _suspects(self, chunks: list[Chunk], before: Flight | None) -> list[tuple[bytes, int]]:
        found = [self._residents[chunk.residency] for chunk in chunks]
        if before is not None:
            named = set(map(id, found))
            found += [each for each in before.residents if id(each) not in named]
        return [(resident.admission.thread, resident.known) for resident in found]

    def _share(self) -> None:
        """Let fresh threads that may be planned now find remembered prefixes."""
        if not self._runner.shares_prefixes:
            return
        budget = self._config.step_tokens
        fresh = [r for r in self._residents.values() if not r.computed and not r.shared]
        for resident in sorted(fresh, key=lambda r: self._candidate(r).rank):
            behind = self._waiting is not None and self._waiting < self._candidate(resident).rank
            if budget <= 0 or behind:
                break
            resident.shared = True
            if not resident.scores_prompt:
                # The last token is always computed: its logits are what is wanted.
                resident.computed = self._table.share(resident.chain, resident.tokens[:-1])
                self.counters.cached_tokens += resident.computed
            budget -= resident.known - resident.computed

    def _plan(self, beside_tokens: int | None) -> Plan:
        return plan(
            [self._candidate(resident) for resident in self._residents.values()],
            blocks_free=self._table.available,
            block_tokens=self._config.block_tokens,
            step_tokens=self._config.step_tokens,
            beside_tokens=beside_tokens,
        )

    def _candidate(self, resident: Resident) -> Candidate:
        return Candidate(
            residency=resident.admission.residency,
            service_class=resident.admission.service_class,
            priority=resident.admission.priority,
            age=resident.age,
            computed=resident.computed,
            known=resident.known,
            blocks=len(resident.chain.blocks),
            blocks_alone=self._table.held_alone(resident.chain),
            allowed=self._allowed(resident),
            chunk_tokens_max=SCORED_ROWS_MAX if resident.scores_prompt else None,
        )

    def _launch(self, chunks: list[Chunk]) -> Flight:
        """Start a step.  Its tokens may stay on the device where every row can be sampled
        there."""
        residents = [self._residents[chunk.residency] for chunk in chunks]
        works = [self._work(resident, chunk) for resident, chunk in zip(residents, chunks)]
        logits_WV = self._runner.compute(works)
        self._count(chunks)
        flight = Flight(residents, works, logits_WV)
        for resident, chunk in zip(residents, chunks):
            resident.computed += chunk.tokens
            flight.computed.append(resident.computed)
        row = 0
        for resident, work in zip(residents, works):
            row += {"none": 0, "last": 1, "all": len(work.tokens)}[work.wanted]
            if resident.computed < resident.known or self._over(resident):
                continue
            admission = resident.admission
            flight.picked.append(row - 1)
            flight.asking.append(resident)
            flight.asks.append(Ask(admission.sampling, resident.tokens, admission.prompt_tokens))
        if self._gpu is not None and flight.stays:
            assert logits_WV is not None
            residencies = [resident.admission.residency for resident in flight.asking]
            flight.drawn = self._gpu.draw(logits_WV, flight.picked, residencies, flight.asks)
            flight.logits_WV = None
            for resident in flight.asking:
                resident.append(UNKNOWN)
        return flight

    def _land(self, flight: Flight, rows: list[Proposal], failed: list[Failure]) -> None:
        """Wait for the tokens of a step and propose them; whoever has left or ended meanwhile is
        passed over."""
        logits_WV = flight.logits_WV
        choices = iter(self._choices(flight))
        asking = set(map(id, flight.asking))
        row = 0
        for resident, work, computed in zip(flight.residents, flight.works, flight.computed):
            choice = next(choices) if id(resident) in asking else None
            count = {"none": 0, "last": 1, "all": len(work.tokens)}[work.wanted]
            row += count
            if not self._holds(resident):
                continue
            self._table.remember(resident.chain, resident.tokens[:computed])
            if work.wanted == "all":
                assert logits_WV is not None
                self._score_prompt(resident, work, logits_WV[row - count : row])
            match choice:
                case RemoteError():
                    failed.append(self._fail(resident, choice))
                case Choice():
                    end = self._end(resident, computed, choice.token)
                    rows.append(self._propose(resident, computed, choice.token, end, choice.score))
                case None if computed == resident.known:
                    rows.append(self._propose(resident, computed, None, END_LENGTH, None))

    def _holds(self, resident: Resident) -> bool:
        held = self._residents.get(resident.admission.residency)
        return held is resident and not resident.ended

    def _choices(self, flight: Flight) -> list[Choice | RemoteError]:
        if flight.drawn is not None:
            return flight.drawn.take()
        logits_WV, picked = flight.logits_WV, flight.picked
        if not picked:
            return []
        assert logits_WV is not None
        greatest = self._runner.greatest
        if len(picked) < len(logits_WV):
            logits_WV = logits_WV[picked]
            if greatest is not None:
                greatest = (
                    [greatest[0][row] for row in picked],
                    [greatest[1][row] for row in picked],
                )
        return self._sampler.choose(logits_WV, flight.asks, greatest)

    def _work(self, resident: Resident, chunk: Chunk) -> Work:
        self._table.extend(resident.chain, chunk.start + chunk.tokens)
        last = chunk.start + chunk.tokens == resident.known and not self._over(resident)
        return Work(
            chunk.residency,
            resident.tokens[chunk.start : chunk.start + chunk.tokens],
            chunk.start,
            resident.chain.blocks,
            "all" if resident.scores_prompt else "last" if last else "none",
        )

    def _count(self, chunks: list[Chunk]) -> None:
        self.counters.steps += 1
        self.counters.rows += sum(chunk.tokens for chunk in chunks)
        self.counters.prefill_tokens += sum(chunk.tokens for chunk in chunks if chunk.tokens > 1)

    def _score_prompt(self, resident: Resident, work: Work, logits: torch.Tensor) -> None:
        """Log-probabilities under the model's own distribution of the tokens that these rows
        predict."""
        prompt_tokens = resident.admission.prompt_tokens
        if work.start == 0:
            resident.prompt_scores.append(TokenScore(int(resident.tokens[0]), None))
        alternatives = resident.admission.sampling.logprobs or 0
        for row, position in enumerate(range(work.start + 1, work.start + len(work.tokens) + 1)):
            if position < prompt_tokens:
                token = int(resident.tokens[position])
                resident.prompt_scores.append(score(logits[row], token, alternatives))

    def _over(self, resident: Resident) -> bool:
        """Whether no further token is wanted."""
        admission = resident.admission
        wanted = admission.prompt_tokens + admission.output_tokens_max
        return resident.known >= min(wanted, self._model_tokens)

    def _allowed(self, resident: Resident) -> bool:
        """Whether the next step may compute it: it has not ended, nor will it with the token that
        is under way, and it is not too far ahead."""
        ahead = resident.known - resident.watermark
        last = resident.unknown and self._over(resident)
        return not resident.ended and not last and ahead <= limits.STEPS_AHEAD_MAX

    def _end(self, resident: Resident, position: int, token: int) -> int:
        admission = resident.admission
        if not admission.sampling.ignore_eos and token in admission.sampling.stop_tokens:
            return END_STOP
        wanted = admission.prompt_tokens + admission.output_tokens_max
        if position + 1 >= min(wanted, self._model_tokens):
            return END_LENGTH
        return END_NONE

    def _propose(
        self,
        resident: Resident,
        position: int,
        token: int | None,
        end: int,
        token_score: TokenScore | None,
    ) -> Proposal:
        admission = resident.admission
        first = admission.prompt_scores and position == len(admission.tokens)
        row = Proposal(
            admission.thread,
            admission.residency,
            position,
            token,
            end,
            token_score,
            resident.prompt_scores if first else None,
        )
        resident.proposals.append(row)
        if token is not None:
            resident.learn(position, token)
            self.counters.tokens += 1
        if end != END_NONE:
            resident.ended = True
            resident.known = min(resident.known, position + 1)
            self._release(resident)
        return row

    # --- leaving ----------------------------------------------------------------------------------

    def _release(self, resident: Resident) -> None:
        self._table.give_back(resident.chain)
        self._runner.forget(resident.admission.residency)
        self._stuck = False

    def _give_back(self, residency: int) -> tuple[bytes, int]:
        resident = self._residents.pop(residency)
        self._release(resident)
        self.counters.gave_back += 1
        return resident.admission.thread, residency

    def _fail(self, resident: Resident, error: RemoteError) -> Failure:
        self._runner.clear(self._table.discard(resident.chain))
        self._runner.forget(resident.admission.residency)
        del self._residents[resident.admission.residency]
        return Failure(resident.admission.thread, resident.admission.residency, error)


def _path(model: Model, runner: Runner, config: EngineConfig) -> str:
    """Precision, device, and by what is computed."""
    precision = str(model.dtype).removeprefix("torch.")
    kind = "transformers"
    if isinstance(model, NativeDecoder) and isinstance(runner, NativeRunner):
        precision, kind = model.precision, f"native {runner.isa}"
    elif isinstance(runner, GpuRunner):
        kind = runner.kind
    elif isinstance(model, Decoder):
        kind = "torch"
    return f"{precision} {model.device.type} {kind} {'exact' if config.exact else 'fast'}"


def _runner(model: Model, blocks: int, config: EngineConfig) -> Runner:
    match model:
        case NativeDecoder():
            return NativeRunner(
                model,
                blocks=blocks,
                block_tokens=config.block_tokens,
                # A prefill gets a block's worth of rows beside any number of decodes.
                rows_max=config.step_tokens + config.residents_max + config.block_tokens,
                threads=config.threads or torch.get_num_threads(),
            )
        case Decoder() if model.device.type == "cuda" and not config.exact:
            return open_runner(
                model,
                blocks=blocks,
                block_tokens=config.block_tokens,
                residents_max=config.residents_max,
            )
        case Decoder():
            return PagedRunner(
                model, blocks=blocks, block_tokens=config.block_tokens, exact=config.exact
            )
        case ForeignModel():
            return ForeignRunner(
                model, blocks=blocks, block_tokens=config.block_tokens, exact=config.exact
            )
        case _:
            raise TypeError(f"{type(model).__name__} is no kind of model that the engine knows")


def _blocks_of(config: EngineConfig, model: Model) -> int:
    assert config.kv_bytes is not None
    size = config.block_tokens * model.kv_token_bytes
    blocks = config.kv_bytes // size
    if blocks < 1:
        raise invalid(f"{config.kv_bytes} bytes for the KV cache; one block takes {size}")
    return blocks
