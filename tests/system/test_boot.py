"""Booting: homes that cannot be, homes of earlier runs, two at once, and full disks."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from libllm.client import AsyncClient
from libllm.config import Home
from libllm.options import Options
from llmproto import limits
from llmproto.errors import ErrorKind, RemoteError

import libllm

from .conftest import EXACT, Boot, System, run_llmos
from .test_inputs import EMBEDDED, refusal

GOLDEN = Path(__file__).parents[1] / "kernel/golden/segment-format-1.bin"
DISK_BYTES = 3 * limits.SEGMENT_BYTES


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path, whose systems are taken down."""
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    yield root
    try:
        for home in (root, *(path for path in root.iterdir() if path.is_dir())):
            System(Home(home)).stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_homes_that_cannot_be(place: Path) -> None:
    """A boot is refused on one line, and nothing is left running."""
    occupied = place / "occupied"
    occupied.write_text("not a folder")
    deep = place / ("d" * 90)
    broken = place / "broken"
    broken.mkdir()
    configs = (
        ("[gateway]\ncolour = 1\n", "colour"),
        ("[nothing]\n", "nothing"),
        ('[gateway]\nport = "http"\n', "gateway.port"),
        ("[gateway]\nport = 70000\n", "65535"),
        ("[gateway\n", "config.toml"),
        ('[executor]\nmode = "quick"\n', "executor.mode"),
    )
    assert str(occupied) in refusal(run_llmos("up", home=occupied))
    assert str(occupied) in refusal(run_llmos("up", home=occupied / "below"))
    said = refusal(run_llmos("up", home=deep))
    assert "107" in said and str(len(str(deep / "run/kernel.sock"))) in said
    assert not deep.exists()
    assert "cannot be" in refusal(run_llmos("up", home=Path("/proc/llmos")))
    for text, wanted in configs:
        (broken / "config.toml").write_text(text)
        assert wanted in refusal(run_llmos("up", home=broken)), text
    assert not System(Home(broken)).pids()


def test_a_port_that_is_taken(place: Path) -> None:
    """The refusal names it; nothing is left running."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (place / "config.toml").write_text(f"[gateway]\nport = {port}\n")
        said = refusal(run_llmos("up", home=place))
    assert str(port) in said and "taken" in said and "gateway" in said
    System(Home(place)).until_gone(seconds=5)


def test_two_boots_at_once_make_one_system(place: Path) -> None:
    (place / "config.toml").write_text(EXACT)

    def up(_: int) -> subprocess.CompletedProcess[str]:
        return run_llmos("up", "--json", home=place)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(up, range(2)))
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert all(json.loads(each.stdout)["ready"] for each in done)
    system = System(Home(place))
    inits = [pid for pid in system.pids() if b"llmkernel.init" in command_of(pid)]
    assert sum(parent_of(pid) not in inits for pid in inits) == 1, inits


def test_after_init_was_killed(booted: Boot) -> None:
    """Its lock is stale, its socket and its notes are left: the next boot starts at once."""
    system = booted()
    pid = int((system.home.run / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # this process started it
    system.boot()
    assert int((system.home.run / "pid").read_text()) != pid
    with libllm.connect(system.home.root) as llm:
        assert llm.generate("A list is", max_tokens=3, ignore_eos=True).usage.output_tokens == 3


def test_a_torn_journal(booted: Boot) -> None:
    """The tail that was not written in whole is cut off, models and threads before it stand."""
    system = booted()
    with libllm.connect(system.home.root) as llm:
        llm.add_model(EMBEDDED, "second")
        epoch = llm.status().kernel_epoch
    system.stop()
    segments = sorted(system.home.journal.glob("segment-*"))
    with segments[0].open("r+b") as file:
        content = file.read()
        end = len(content.rstrip(b"\0"))
        file.seek(end)
        file.write(b"\x20\0\0\0torn")
    system.boot()
    with libllm.connect(system.home.root) as llm:
        assert {row.model.name for row in llm.models()} == {"llmos-mini", "second"}
        assert llm.status().kernel_epoch > epoch
        assert llm.generate("A list is", model="second", max_tokens=3).text


def test_a_damaged_journal(place: Path) -> None:
    """What cannot be trusted is not read over: the boot is refused, soon, in the kernel's words."""
    (place / "config.toml").write_text(EXACT)
    home = Home(place)
    home.make()
    shutil.copy(GOLDEN, home.journal / "segment-0000000000000001")  # it says that it is another
    said = refusal(run_llmos("up", home=place, timeout=45))
    assert "segment-0000000000000001 is damaged at byte 0" in said
    System(home).until_gone(seconds=5)


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[System]:
    """A system whose journal has a small disk of its own."""
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    home = Home(root)
    home.make()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(home.journal)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        shutil.rmtree(root)
        pytest.skip("needs the right to mount")
    (root / "config.toml").write_text(EXACT)
    system = System(home)
    try:
        system.boot()
        yield system
        system.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(home.journal)], check=True)
        shutil.rmtree(root, ignore_errors=True)


def fill(folder: Path) -> Path:
    """Take what is left of the disk."""
    path = folder / "ballast"
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            pass
    return path


async def until_refused(client: AsyncClient, folder: Path) -> RemoteError:
    """Fill the journal with threads that cost next to nothing, until no more is admitted."""
    for turn in range(500):
        await asyncio.to_thread(fill, folder)  # compaction gives room back
        stops = [f"{turn} {number} ".ljust(limits.STOP_BYTES_MAX, "x") for number in range(16)]
        asks = [
            asyncio.create_task(client.generate("x", max_tokens=1, stop=stops)) for _ in range(16)
        ]
        done, paused = await asyncio.wait(asks, return_when=asyncio.FIRST_EXCEPTION)
        for ask in paused:
            ask.cancel()
        await asyncio.wait(asks)
        for ask in done:
            error = ask.exception()
            if error is not None:
                assert isinstance(error, RemoteError), error
                return error
    raise AssertionError("the journal is not full")


async def test_a_full_disk(full: System) -> None:
    """Admissions are refused, what runs pauses, nothing dies; with room again all goes on."""
    options: Options = {"max_tokens": 500, "temperature": 0.0, "ignore_eos": True}
    patience: Options = {**options, "wait": True}
    async with full.client() as client:
        twin = await client.generate("A list is", **options)
        before = {row.name: row.pid for row in await client.ps()}
        running = await client.generate(  # unread: it waits
            "A list is", stream=True, max_tokens=500, temperature=0.0, ignore_eos=True
        )
        refused = await until_refused(client, full.home.journal)
        assert refused.kind is ErrorKind.EXHAUSTED, refused
        assert "journal" in refused.detail and refused.retry_after_ms
        assert (await client.status()).journal_full
        said = await asyncio.to_thread(
            run_llmos, "run", "llmos-mini", "x", "--max-tokens", "2", home=full.home.root
        )
        assert "EXHAUSTED" in refusal(said)
        patient = asyncio.create_task(client.generate("A list is", **patience))
        assert {row.name: row.pid for row in await client.ps()} == before
        (full.home.journal / "ballast").unlink()
        assert "".join([piece.text async for piece in running]) == twin.text
        assert (await patient).text == twin.text
        assert {row.name: row.pid for row in await client.ps()} == before
        assert not (await client.status()).journal_full
        await full.until_settled(client)


# --- what processes import ------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "typer", "starlette", "uvicorn", "openai", "jinja2")
IMPORTS = {
    "libllm": {"zmq", "uvloop", "msgspec", *HEAVY},
    "libllm.client": set(HEAVY),
    "llmkernel.init.__main__": {"zmq", "asyncio", *HEAVY},
    "llmkernel.__main__": {"numpy", *HEAVY},
    "llmservices.monitor.__main__": {"numpy", *HEAVY},
    "llmservices.tokenizer.__main__": {"torch", "transformers", "typer", "starlette"},
    "llmservices.store.__main__": {"numpy", *HEAVY},
    "llmservices.gateway.__main__": {"torch", "transformers", "typer", "tokenizers"},
}


@pytest.mark.parametrize("module", IMPORTS)
def test_no_process_imports_what_it_does_not_need(module: str) -> None:
    """Imports are most of the time that a boot takes."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not IMPORTS[module] & set(done.stdout.split())


def command_of(pid: int) -> bytes:
    """Its command line."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def parent_of(pid: int) -> int:
    """The process that it is a child of."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[1])
