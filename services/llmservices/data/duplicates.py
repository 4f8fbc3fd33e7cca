"""Duplicates: which rows have been seen before, exactly or nearly.

Exact: by a digest of 16 bytes, so that a billion rows collide with a probability of 1e-21.  Near:
Jaccard similarity of the sets of word 5-shingles, estimated by MinHash, candidates by locality-
sensitive hashing.  Sources: Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3.
The first of several stays.
"""

import importlib.metadata
from typing import Any, Final, Literal

import rensa
from blake3 import blake3
from llmproto.errors import invalid

SHINGLE_WORDS: Final = 5
PERMUTATIONS: Final = 128
"""The estimate's standard error is below 1 / (2 sqrt(128)) = 0.045."""
FOUND_MIN: Final = 0.99
"""Probability that two rows that are just similar enough are compared at all."""
NEAR_ROWS_MAX: Final = 4_000_000
"""About 2 KB of memory each."""
LIBRARIES: Final = (f"rensa {importlib.metadata.version('rensa')}",)


class Seen:
    """The rows so far."""

    def __init__(self, kind: Literal["none", "exact", "near"], similarity: float) -> None:
        self._kind = kind
        self._digests: set[bytes] = set()
        self._similarity = similarity
        # the library has no types
        self._near: Any = rensa.RMinHashLSH(similarity, PERMUTATIONS, bands(similarity))
        self._kept: list[Any] = []

    def again(self, key: bytes, text: str) -> str | None:
        """Why this row is left out, or None: then it counts as seen from now on.

        `key` is all that makes rows equal, `text` what they are compared by.
        """
        if self._kind == "none":
            return None
        digest = blake3(key).digest(16)
        if digest in self._digests:
            return "duplicate"
        if self._kind == "near" and self._is_near(text):
            return "near_duplicate"
        self._digests.add(digest)
        return None

    def _is_near(self, text: str) -> bool:
        found = minhash(text)
        for row in self._near.query(found):
            if found.jaccard(self._kept[row]) >= self._similarity:
                return True
        if len(self._kept) >= NEAR_ROWS_MAX:
            raise invalid(
                f"more than {NEAR_ROWS_MAX} rows cannot be compared with one another: clean them "
                'in parts, or with duplicates = "exact"'
            )
        self._near.insert(len(self._kept), found)
        self._kept.append(found)
        return False


def bands(similarity: float) -> int:
    """Into how many bands a signature is cut: the fewest with which rows that are just similar
    enough become candidates with a probability of FOUND_MIN.

    With b bands of r values that probability is 1 - (1 - s^r)^b.
    """
    rows = PERMUTATIONS
    while rows > 1:
        count = PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** count >= FOUND_MIN:
            return count
        rows //= 2
    return PERMUTATIONS


def minhash(text: str) -> Any:  # the library has no types
    """The signature of a text's shingles."""
    found = rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
    found.update(shingles(text))
    return found


def shingles(text: str) -> list[str]:
    """Every run of SHINGLE_WORDS words once; of a shorter text, the whole."""
    words = text.split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return sorted({" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)})
