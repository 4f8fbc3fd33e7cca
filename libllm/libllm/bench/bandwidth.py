"""How fast this machine reads memory: `python -m libllm.bench.bandwidth` prints bytes a second.

The C library's memchr looks in vain for a byte in more memory than any cache holds, on every core
at once; it is written in the processor's widest loads, reads each byte once, and writes none.
"""

import argparse
import ctypes
import os
import statistics
import threading
import time
from typing import Final

BYTES: Final = 1 << 29
SECONDS: Final = 1.5


def read_bandwidth(cores: int, *, total: int = BYTES, seconds: float = SECONDS) -> float:
    """Bytes a second, the median of the passes of so long a time: where others share the memory, a
    single pass may be twice as fast as what lasts."""
    search = ctypes.CDLL(None).memchr
    search.restype = ctypes.c_void_p
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    buffer = ctypes.create_string_buffer(total)
    begin = ctypes.addressof(buffer)
    ctypes.memset(begin, 1, total)  # pages that were never written are one page of zeros
    share = total // cores
    passes: list[float] = []
    until = time.perf_counter() + seconds
    while not passes or time.perf_counter() < until:
        threads = [
            threading.Thread(target=search, args=(begin + core * share, 0, share))
            for core in range(cores)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passes.append(cores * share / (time.perf_counter() - began))
    return statistics.median(passes)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="libllm.bench.bandwidth", description=__doc__)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    print(read_bandwidth(parser.parse_args().cores))


if __name__ == "__main__":
    main()
