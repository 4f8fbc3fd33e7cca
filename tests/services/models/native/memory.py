"""What of this process's memory is resident, and what is mapped, as Linux counts it."""

import mmap
import re
from pathlib import Path

import torch

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Rss: +([0-9]+) kB", re.MULTILINE | re.DOTALL)


def resident_pages(tensor: torch.Tensor) -> int:
    """Of the mapping that it lies in."""
    for begin, end, kilobytes in _MAPPING.findall(Path("/proc/self/smaps").read_text()):
        if int(begin, 16) <= tensor.data_ptr() < int(end, 16):
            return int(kilobytes) * 1024 // mmap.PAGESIZE
    raise AssertionError("no mapping holds it")


def is_mapped(path: Path) -> bool:
    """Whether the file is."""
    return any(row.endswith(str(path)) for row in Path("/proc/self/maps").read_text().splitlines())
