"""Claiming a home: its folders, its lock, its keys."""

import fcntl
import os
import secrets
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

from libllm.config import PROOF_BYTES, Home
from llmproto.errors import RemoteError, invalid

LOCK_WAIT_S: Final = 3.0
"""For the remains of an init that was killed."""
_LOCK_POLL_S: Final = 0.02


class HeldElsewhere(Exception):
    """Another init runs on this home."""

    def __init__(self, home: Home, pid: int | None) -> None:
        who = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{who} already runs the system in {home.root}; `llmos down` ends it")


class Claim:
    """A home that is ours until this process and its guard are gone.

    Invariant: at most one claim of a home exists (flock on run/lock).
    """

    def __init__(self, home: Home) -> None:
        """RemoteError(INVALID) for a home that cannot be used, HeldElsewhere for one in use."""
        self.home = home
        home.check_socket_path()
        home.make()
        try:
            if stat.S_IMODE(home.root.stat().st_mode) & 0o077:
                home.root.chmod(0o700)
            self.lock_fd = _lock(home)
            _write_atomically(self.pid_file, f"{os.getpid()}\n".encode())
            for path in (home.operator_key, home.service_key):
                if not path.exists():
                    _write_atomically(path, secrets.token_bytes(PROOF_BYTES))
        except OSError as error:
            raise _unusable(home, error) from None

    @property
    def pid_file(self) -> Path:
        """Names the init that runs here; informative, the lock decides."""
        return self.home.run / "pid"

    def release(self) -> None:
        """The orderly end."""
        self.pid_file.unlink(missing_ok=True)
        os.close(self.lock_fd)


def _unusable(home: Home, error: OSError) -> RemoteError:
    return invalid(
        f"the home {home.root} cannot be used ({error.strerror}: {error.filename}): name another "
        "with --home or LLMOS_HOME"
    )


def _lock(home: Home) -> int:
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            holder = _holder(home)
            if holder is None or _lives(holder) or time.monotonic() > give_up:
                os.close(descriptor)
                raise HeldElsewhere(home, holder) from None
        time.sleep(_LOCK_POLL_S)


def _holder(home: Home) -> int | None:
    try:
        text = (home.run / "pid").read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_atomically(path: Path, content: bytes) -> None:
    """The file is whole or absent, and closed to others (mkstemp makes it 0600)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
