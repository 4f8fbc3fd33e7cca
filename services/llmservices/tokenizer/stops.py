"""Stop strings in a text that arrives in pieces, whatever the borders.

The first stop string to be *complete* ends the text, of several complete at once the longest; the
text before it is emitted.  So the result does not depend on how the text was cut.
"""

import functools
import re
from collections import deque
from collections.abc import Sequence
from typing import Final

AUTOMATA_MAX: Final = (
    64  # the choices of one request share an automaton; one has at most 4,096 nodes
)


class Automaton:
    """All stop strings at once, in time linear in the text.

    Node 0 is the empty string; node n is the longest suffix of the text that begins a stop string.
    Source: Aho and Corasick 1975, with the failure links followed when reading.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.fails: list[int] = [0]
        self.depths: list[int] = [0]
        self.found: list[str | None] = [None]
        """The longest stop string that ends here."""
        for stop in stops:
            self._add(stop)
        self._link()
        first = "".join(re.escape(character) for character in self.children[0])
        self.begins = re.compile(f"[{first}]") if first else re.compile("(?!)")
        """Finds the next character that can begin a stop string."""

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self.children[node]:
                self.children[node][character] = len(self.children)
                self.children.append({})
                self.fails.append(0)
                self.depths.append(self.depths[node] + 1)
                self.found.append(None)
            node = self.children[node][character]
        self.found[node] = stop

    def _link(self) -> None:
        """Breadth first, so that a node's failure link is ready before its children's."""
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            self.found[node] = self.found[node] or self.found[self.fails[node]]
            for character, child in self.children[node].items():
                self.fails[child] = self.step(self.fails[node], character)
                queue.append(child)

    def step(self, node: int, character: str) -> int:
        """The node after one more character."""
        while True:
            child = self.children[node].get(character)
            if child is not None:
                return child
            if not node:
                return 0
            node = self.fails[node]


@functools.lru_cache(maxsize=AUTOMATA_MAX)
def automaton_of(stops: tuple[str, ...]) -> Automaton:
    """Made once for the same stop strings; never changed afterwards."""
    return Automaton(stops)


class StopMatcher:
    """Holds back what may still become a stop string.

    Invariant: `_held` is the longest suffix of the text so far that begins a stop string without
    completing one.
    """

    __slots__ = ("_automaton", "_held", "_node")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = automaton_of(tuple(stops))
        self._node = 0
        self._held = ""

    @property
    def held(self) -> str:
        """What was pushed and not emitted."""
        return self._held

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain by now, and the stop string that ended it.  Nothing may be
        pushed behind one.
        """
        automaton, node, index = self._automaton, self._node, 0
        while index < len(text):
            if not node:
                begin = automaton.begins.search(text, index)
                if begin is None:
                    break
                index = begin.start()
            node = automaton.step(node, text[index])
            index += 1
            stop = automaton.found[node]
            if stop is not None:
                emitted = (self._held + text[:index])[: -len(stop)]
                self._node, self._held = 0, ""
                return emitted, stop
        whole = self._held + text
        border = len(whole) - automaton.depths[node]
        self._node, self._held = node, whole[border:]
        return whole[:border], None

    def finish(self) -> str:
        """What was held back: it did not become a stop string."""
        held, self._node, self._held = self._held, 0, ""
        return held
