"""Finding the thread that kills its executor, without hurting those beside it.

After a self-made death the threads of the step are *suspects*.  They are tried again in halves,
each half alone on the executor and only until each of its threads has committed one position; a
half that kills is halved again, until one thread is alone.  Two strikes alone at one position, or
`ALONE_DEATHS_MAX` deaths alone at any, end a thread.  Where both halves of a set survive, only
their company kills: they are kept apart from then on.

Invariant (`check`): a thread stands in at most one trial, and no trial is empty.
Source: group testing by halving, Dorfman 1943; the rule of two strikes is ours.
"""

from llmproto import limits

Trial = tuple[bytes, ...]


class Poison:
    """Suspects and what is known of them; pure bookkeeping, placed by the dispatcher."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        """To be run one after another; the first is the current one."""
        self.cleared: dict[bytes, None] = {}
        """Threads of the current trial that have committed a position in it."""
        self.strikes: dict[bytes, tuple[int, int]] = {}
        """thread -> (position, self-made deaths alone there)."""
        self.alone_deaths: dict[bytes, int] = {}
        self.apart: list[tuple[dict[bytes, None], dict[bytes, None]]] = []
        """Pairs of sets that crash only together."""
        self._halves: list[tuple[Trial, Trial]] = []
        """Splits whose two halves have both to survive before they are known to kill together."""
        self._survived: dict[Trial, None] = {}

    @property
    def watching(self) -> bool:
        """Commits matter to it."""
        return bool(self.trials or self.strikes)

    @property
    def current(self) -> Trial | None:
        """The threads that must run alone now, if a trial is on."""
        return self.trials[0] if self.trials else None

    def died(self, suspects: dict[bytes, int]) -> list[bytes]:
        """A self-made death with these threads (and positions) in the step.

        Returns the threads that must end: their own death is certain.
        """
        if not suspects:
            return []
        current = self.current
        self.cleared = {}
        if current is not None and any(thread in suspects for thread in current):
            # What of the trial was in this step is guilty, the rest is tried again.
            self.trials.pop(0)
            rest = tuple(t for t in current if t not in suspects)
            if rest:
                self.trials.insert(0, rest)
            suspects = {t: p for t, p in suspects.items() if t in current}
        if len(suspects) > 1:
            self._split(tuple(suspects))
            return []
        return self._struck(*next(iter(suspects.items())))

    def _struck(self, thread: bytes, position: int) -> list[bytes]:
        self.alone_deaths[thread] = self.alone_deaths.get(thread, 0) + 1
        before, count = self.strikes.get(thread, (position, 0))
        count = count + 1 if before == position else 1
        self.strikes[thread] = (position, count)
        if count >= limits.STRIKES_MAX or self.alone_deaths[thread] >= limits.ALONE_DEATHS_MAX:
            self.forget(thread)
            return [thread]
        self._try_only_in((thread,))
        return []

    def _try_only_in(self, *trials: Trial) -> None:
        """These trials come next; a thread that is tried already is not tried twice."""
        known = dict.fromkeys(thread for trial in trials for thread in trial)
        others = (tuple(t for t in trial if t not in known) for trial in self.trials)
        self.trials = [*trials, *(trial for trial in others if trial)]

    def _split(self, suspects: Trial) -> None:
        middle = len(suspects) // 2
        first, second = suspects[:middle], suspects[middle:]
        self._halves.append((first, second))
        self._try_only_in(first, second)

    def committed(self, thread: bytes) -> bool:
        """A thread committed a position: its strikes there are void.  True when that ended the
        current trial."""
        self.strikes.pop(thread, None)
        current = self.current
        if current is None or thread not in current:
            return False
        self.cleared[thread] = None
        if any(t not in self.cleared for t in current):
            return False
        self._pass(current)
        return True

    def _pass(self, trial: Trial) -> None:
        self.trials.pop(0)
        self.cleared = {}
        self._survived[trial] = None
        for pair in list(self._halves):
            if pair[0] in self._survived and pair[1] in self._survived:
                self.apart.append((dict.fromkeys(pair[0]), dict.fromkeys(pair[1])))
                self._halves.remove(pair)
        if not self.trials:
            self._halves.clear()
            self._survived.clear()

    def forget(self, thread: bytes) -> None:
        """The thread ended, paused or left for any other reason."""
        self.strikes.pop(thread, None)
        self.alone_deaths.pop(thread, None)
        self.withdraw(thread)
        for pair in self.apart:
            pair[0].pop(thread, None)
            pair[1].pop(thread, None)
        self.apart = [pair for pair in self.apart if pair[0] and pair[1]]

    def withdraw(self, thread: bytes) -> None:
        """The thread cannot run now: no trial waits for it."""
        if not self.trials:
            return
        current = self.trials[0]
        trials = [tuple(t for t in trial if t != thread) for trial in self.trials]
        self.trials = [trial for trial in trials if trial]
        self.cleared.pop(thread, None)
        if not trials[0]:
            self.cleared = {}
        elif trials[0] != current and all(t in self.cleared for t in trials[0]):
            self._pass(trials[0])

    def enemies(self, thread: bytes) -> dict[bytes, None]:
        """Threads that must not share an executor with this one."""
        found: dict[bytes, None] = {}
        for first, second in self.apart:
            if thread in first:
                found.update(second)
            elif thread in second:
                found.update(first)
        return found

    def check(self) -> None:
        """Assert the invariant in full."""
        tried = [t for trial in self.trials for t in trial]
        assert len(tried) == len(dict.fromkeys(tried)), self.trials
        assert all(self.trials)
        assert all(t in (self.current or ()) for t in self.cleared)
