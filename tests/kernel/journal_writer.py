"""A process that appends numbered records, and says of each that it is written, until killed."""

import os
import struct
import sys
from pathlib import Path

from llmkernel.journal import Journal, Options


def main(folder: str, first: int) -> None:
    """Append record after record: its number, then filling whose length follows from the number."""
    options = Options(bytes_max=1 << 30, segment_bytes=1 << 16)
    journal, payloads = Journal.open(Path(folder), options)
    for _ in payloads:
        pass
    for number in range(first, 1 << 40):
        journal.append(struct.pack("<Q", number) * (1 + number % 97))
        os.write(1, struct.pack("<Q", number))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
