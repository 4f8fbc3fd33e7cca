"""What the kernel has committed, kept by the world itself: the word that delivered text is held to.

Invariant: positions follow one another, whatever crashed in between; every token was proposed by
an executor whose context was exactly what is committed before it.
"""

import zlib

from llmkernel.facts import AnyFact, ThreadAdmitted, ThreadEnded, TokensCommitted
from llmkernel.testkit.oracle import piece


class Account:
    """One thread."""

    def __init__(self, fact: ThreadAdmitted) -> None:
        self.prompt_tokens = fact.prompt_tokens
        self.states = [zlib.crc32(fact.tokens, fact.sampling.seed)]
        """Of the context, after the prompt and after each token."""
        self.tokens: list[int] = []


class Ledger:
    """Every thread that was ever admitted."""

    def __init__(self) -> None:
        self.by_thread: dict[bytes, Account] = {}
        self.by_stream: dict[bytes, Account] = {}
        self.proposed: set[tuple[int, int]] = set()
        """(state of the context, token) of everything that executors computed."""

    def record(self, fact: AnyFact) -> None:
        """Follow the journal."""
        if isinstance(fact, ThreadAdmitted):
            if fact.thread not in self.by_thread:
                account = self.by_thread[fact.thread] = Account(fact)
                self.by_stream[fact.key + bytes((fact.index,))] = account
        elif isinstance(fact, TokensCommitted):
            for thread, position, token in zip(fact.threads, fact.positions, fact.tokens):
                account = self.by_thread[thread]
                assert token is not None
                assert position == account.prompt_tokens + len(account.tokens), (thread, position)
                assert (account.states[-1], token) in self.proposed, "computed from another context"
                account.tokens.append(token)
                account.states.append(zlib.crc32(token.to_bytes(4, "little"), account.states[-1]))
        elif isinstance(fact, ThreadEnded):
            account = self.by_thread[fact.thread]
            length = fact.length - account.prompt_tokens
            del account.tokens[length:], account.states[length + 1 :]

    def text(self, stream: bytes, stop: str) -> str:
        """All that may have been delivered by now."""
        account = self.by_stream.get(stream)
        text = "" if account is None else "".join(map(piece, account.tokens))
        return text[: text.index(stop)] if stop and stop in text else text
