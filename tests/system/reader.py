"""`python reader.py HOME REQUESTS OUTPUT`: a client process that reads streams and can be killed.

REQUESTS holds encoded Generate bodies, one hexadecimal line each; every piece is a line of OUTPUT
before the next one is asked for.  The process ends when all streams have.
"""

import asyncio
import os
import sys
from pathlib import Path

import msgspec
from libllm.client import AsyncClient, open_client
from libllm.config import Home
from llmproto import wire
from llmproto.generation import Generate, TextScore
from llmproto.kinds import KIND_OF


class Line(msgspec.Struct, frozen=True):
    """What came of a stream; without text, that its request was accepted."""

    stream: str
    text: str = ""
    offset: int = 0
    scores: list[TextScore] | None = None
    finish_reason: str | None = None


def read_lines(path: Path) -> list[Line]:
    """All that were written; a torn one never was."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(line, type=Line) for line in whole]


async def read(client: AsyncClient, request: Generate, output: int) -> None:
    """One request to its end."""
    generation = client.start(request)
    await generation.wait_accepted()
    for stream in generation.streams:
        _write(output, Line(stream.hex()))
    async for piece in generation:
        _write(
            output,
            Line(piece.stream.hex(), piece.text, piece.offset, piece.scores, piece.finish_reason),
        )


def _write(output: int, line: Line) -> None:
    os.write(output, msgspec.json.encode(line) + b"\n")


async def main(home: str, requests: str, output: str) -> None:
    """All requests at once."""
    client = await open_client(Home.find(home))
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    bodies = [bytes.fromhex(line) for line in Path(requests).read_text().split()]
    asked = [wire.decode_body(KIND_OF[Generate], body) for body in bodies]
    await asyncio.gather(
        *(read(client, request, descriptor) for request in asked if isinstance(request, Generate))
    )
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
