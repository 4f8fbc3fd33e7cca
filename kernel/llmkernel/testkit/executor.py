"""An executor without a model: proposes what the oracle says, and dies of what is poisoned."""

from typing import Final

from libllm.events import Arrived, Post, Welcomed
from llmproto import limits
from llmproto.base import Message
from llmproto.errors import ErrorKind
from llmproto.execution import Drop, ExecutorReady, GaveBack, LoadFailed, Resync, Run, Stepped
from llmproto.init import Child
from llmproto.threads import Committed
from llmproto.wire import unpack_tokens

from libllm import events as session_events
from llmkernel.events import Suspect
from llmkernel.testkit.oracle import HANGS, PAIR, POISON, POISON_TOKENS, Context, end_of
from llmkernel.testkit.rig import MODEL, MS
from llmkernel.testkit.store import BROKEN
from llmkernel.testkit.world import SIGSEGV, Process, World

STEP_MS: Final = 12
LOAD_MS: Final = 20
RESEND_MS: Final = 400
BLOCKS: Final = 1000


class Resident:
    """One stay of one thread."""

    __slots__ = (
        "context",
        "end",
        "first",
        "length_max",
        "prompt_tokens",
        "rows",
        "said_ns",
        "thread",
        "watermark",
    )

    def __init__(self, run: Run) -> None:
        self.thread = run.thread
        self.context = Context(run.tokens, run.sampling.seed)
        self.first = unpack_tokens(run.tokens[:4])[0]
        self.prompt_tokens = run.prompt_tokens
        self.length_max = run.prompt_tokens + run.output_tokens_max
        self.watermark = self.context.tokens - 1
        self.end = 0
        self.rows: list[tuple[int, int | None, int]] = []
        """(position, token, end) of what is not committed as far as is known."""
        self.said_ns = 0


class FakeExecutor(Process):
    """Keeps what it proposed until the watermark passes it; at most STEPS_AHEAD_MAX beyond it."""

    def __init__(self, world: World, child: Child) -> None:
        super().__init__(world, child)
        said = dict(zip(child.spec.arguments[::2], child.spec.arguments[1::2]))
        self.model = said["--model"]
        self.residents: dict[int, Resident] = {}
        self.progress = 0
        self.loaded = False
        self.stepping = False
        self.note: tuple[Suspect, ...] = ()
        world.after(LOAD_MS, self._load)

    def holding(self) -> session_events.Holding:
        """Its residencies."""
        return session_events.Holding(
            self.progress + 1 if self.loaded else 0,
            [resident.thread for resident in self.residents.values()],
            list(self.residents),
        )

    def suspects(self) -> tuple[Suspect, ...]:
        """What the step was computing."""
        return self.note

    def say(self, message: Message) -> None:
        """Tell the kernel."""
        self.feed(Post(message))

    def took(self, effect: session_events.Effect) -> None:
        """Announce itself; follow the kernel."""
        if isinstance(effect, Welcomed) and self.loaded:
            self._announce()
        elif isinstance(effect, Arrived):
            self._told(effect.message)

    def _load(self) -> None:
        if self.model == BROKEN:
            if self.alive and not self.stopped:
                self.say(LoadFailed(self.model, ErrorKind.INVALID, "it is damaged"))
                self.world.after(5, lambda: self.world.signal(self.child.pid, 0, code=0))
            return
        self.loaded = True
        self._announce()

    def _announce(self) -> None:
        self.say(ExecutorReady(self.model, MODEL.digest, 2048, BLOCKS, 16, 64))

    def _told(self, message: Message) -> None:
        match message:
            case Run():
                if message.residency not in self.residents:
                    self.residents[message.residency] = Resident(message)
                    self._go()
            case Drop():
                for residency in message.residencies:
                    self.residents.pop(residency, None)
            case Committed():
                marks = dict(zip(message.threads, message.positions))
                for residency, resident in list(self.residents.items()):
                    mark = marks.get(resident.thread)
                    if mark is not None:
                        self._committed(residency, resident, mark)
            case Resync():
                found = self.residents.get(message.residency)
                if found is not None:
                    self._repeat({message.residency: found})
            case _:
                raise AssertionError(message)

    def _committed(self, residency: int, resident: Resident, mark: int) -> None:
        resident.watermark = max(resident.watermark, mark)
        resident.rows = [row for row in resident.rows if row[0] > mark]
        if resident.end and not resident.rows:
            self.residents.pop(residency, None)
        self._go()

    def _go(self) -> None:
        if not self.stepping and self.residents:
            self.stepping = True
            self.world.after(STEP_MS * (0.5 + self.world.random.random()), self._step)

    def _step(self) -> None:
        self.stepping = False
        if not self.alive or self.stopped or not self.residents:
            return
        if self.world.random.random() < 0.01:
            self._give_back()
        moving = {
            residency: resident
            for residency, resident in self.residents.items()
            if not resident.end
            and resident.context.tokens - 1 - resident.watermark < limits.STEPS_AHEAD_MAX
        }
        self.note = tuple(Suspect(r.thread, r.context.tokens) for r in moving.values())
        if self._dies(list(moving.values())):
            return
        said: dict[int, list[tuple[int, int | None, int]]] = {}
        for residency, resident in moving.items():
            position = resident.context.tokens
            if position >= resident.length_max:
                row: tuple[int, int | None, int] = (position, None, 2)
            else:
                state = resident.context.state
                token = resident.context.next(residency % 5 if self.world.fast else 0)
                self.world.ledger.proposed.add((state, token))
                output_tokens = resident.context.tokens - resident.prompt_tokens
                output_tokens_max = resident.length_max - resident.prompt_tokens
                row = (position, token, end_of(token, output_tokens, output_tokens_max))
            resident.end = row[2]
            resident.rows.append(row)
            resident.said_ns = self.world.now_ns
            said[residency] = [row]
        late_ns = self.world.now_ns - RESEND_MS * MS
        late = {
            residency: resident
            for residency, resident in self.residents.items()
            if resident.rows and resident.said_ns < late_ns
        }
        if said:
            self.progress += 1
            self._propose(said)
        self._repeat(late)
        self._go()

    def _repeat(self, residents: dict[int, Resident]) -> None:
        for resident in residents.values():
            resident.said_ns = self.world.now_ns
        rows = {residency: list(r.rows) for residency, r in residents.items() if r.rows}
        if rows:
            self._propose(rows)

    def _propose(self, rows: dict[int, list[tuple[int, int | None, int]]]) -> None:
        step = Stepped([], [], [], [], [], BLOCKS - len(self.residents))
        for residency, columns in rows.items():
            for position, token, end in columns:
                step.threads.append(self.residents[residency].thread)
                step.residencies.append(residency)
                step.positions.append(position)
                step.tokens.append(token)
                step.ends.append(end)
        self.say(step)

    def _give_back(self) -> None:
        residency = self.world.random.choice(list(self.residents))
        thread = self.residents.pop(residency).thread
        self.say(GaveBack([thread], [residency], BLOCKS))

    def _dies(self, moving: list[Resident]) -> bool:
        ripe = [r for r in moving if r.context.tokens >= r.prompt_tokens + POISON_TOKENS]
        firsts = [resident.first for resident in ripe]
        if POISON in firsts or firsts.count(PAIR) > 1:
            self.world.signal(self.child.pid, SIGSEGV)
            return True
        if HANGS in firsts:
            # It goes on beating, and never steps again.
            self.stepping = True
            return True
        return False
