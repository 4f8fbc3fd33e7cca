"""Several documents in one row.  Pure: lengths in, rows of documents out.

Invariant of `isolated`: every document stands in exactly one row, whole.  Of `joined`: the rows one
after another are the documents one after another, every token once.
"""

import bisect

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def isolated(lengths: Int64s, room: int) -> tuple[Int64s, Int64s]:
    """Documents in the order of their rows, and where each row begins among them (and the end).

    Source: best-fit decreasing for bin packing (Johnson 1973): the longest document first, each
    into the fullest row that has room.  No document may be longer than the room.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= room
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
    rooms: list[int] = []  # those that some row has, ascending
    by_length = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    for document in by_length:
        size = sizes[document]
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            left = rooms[place]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del rooms[place]
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        left -= size
        if left > 0:
            if not open_rows[left]:
                bisect.insort(rooms, left)
            open_rows[left].append(row)
    documents = np.array([document for row in rows for document in row], np.int64)
    return documents, offsets_of(np.array([len(row) for row in rows], np.int64))


def joined(tokens: int, room: int) -> Int64s:
    """Where each row begins in all the tokens (and the end); only the last may be shorter."""
    return np.append(np.arange(0, tokens, room, dtype=np.int64), np.int64(tokens))


def offsets_of(lengths: Int64s) -> Int64s:
    """Where each begins, and the end of the last."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: Int64s, lengths: Int64s) -> Int64s:
    """All numbers start .. start + length - 1 of each, in order."""
    before = offsets_of(lengths)
    return np.repeat(starts - before[:-1], lengths) + np.arange(before[-1])
