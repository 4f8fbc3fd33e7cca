"""The hub's library against a stand-in hub on this machine: real downloads of a tiny folder."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from llmproto.errors import ErrorKind

from libllm import hub

COMMIT = "c0ffee" + 34 * "0"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": bytes(range(256)) * 64,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"not wanted",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.safetensors": b"another format",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}

FETCH = """
import sys
from libllm import hub
from llmproto.errors import RemoteError
try:
    print(hub.fetch(sys.argv[1]))
except RemoteError as error:
    sys.exit(str(error))
"""


class StandIn(ThreadingHTTPServer):
    """The endpoints that fetching one repository, tiny/model, takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = dict(FILES)
        self.torn = 0
        """So many downloads of weights break off half-way."""
        self.lock = threading.Lock()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no matter for the output of a test."""


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if "gated" in parts:
            self._refuse(403, "GatedRepo")
        elif parts[:4] == ["api", "models", "tiny", "model"]:
            self._describe(parts[4:])
        elif parts[:3] == ["tiny", "model", "resolve"]:
            self._file("/".join(parts[4:]))
        else:
            self._refuse(404, "RepoNotFound")

    def _describe(self, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
                    for path, data in self.server.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in self.server.files]
            self._json({"id": "tiny/model", "sha": COMMIT, "siblings": siblings})

    def _file(self, path: str) -> None:
        data = self.server.files[path]
        self.send_response(200)
        self.send_header("ETag", f'"{_digest(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.server.lock:
            tear = path.endswith(".safetensors") and self.server.torn > 0
            self.server.torn -= tear
        if tear:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def _json(self, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(
    name: str, cache: Path, endpoint: str, *, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its environment when it is imported."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", FETCH, name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_arrives_with_what_it_needs_and_nothing_else(
    standin: StandIn, tmp_path: Path
) -> None:
    done = fetch("tiny/model", tmp_path, standin.url)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert done.stderr == ""


def test_offline_takes_what_the_cache_has_and_refuses_the_rest(
    standin: StandIn, tmp_path: Path
) -> None:
    online = fetch("tiny/model", tmp_path, standin.url)
    standin.requests.clear()
    offline = fetch("tiny/model", tmp_path, standin.url, offline=True)
    assert (offline.returncode, offline.stdout) == (0, online.stdout)
    refused = fetch("tiny/other", tmp_path, standin.url, offline=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("UNAVAILABLE: tiny/other is not complete in the cache")
    assert "HF_HUB_OFFLINE" in refused.stderr
    assert standin.requests == []


def test_what_is_not_there_is_named(standin: StandIn, tmp_path: Path) -> None:
    done = fetch("tiny/missing", tmp_path, standin.url)
    assert done.stderr.startswith(f"INVALID: {standin.url} has no model tiny/missing")


def test_gated_says_what_to_do(standin: StandIn, tmp_path: Path) -> None:
    done = fetch("tiny/gated", tmp_path, standin.url)
    assert done.stderr.startswith("DENIED: tiny/gated is gated: accept its conditions at")


def test_a_repository_without_safetensors_is_no_model(standin: StandIn, tmp_path: Path) -> None:
    del standin.files["model.safetensors"]
    done = fetch("tiny/model", tmp_path, standin.url)
    assert done.stderr.startswith("INVALID: tiny/model on the hub has no *.safetensors file")


def test_a_torn_download_is_never_taken_for_a_model(standin: StandIn, tmp_path: Path) -> None:
    standin.torn = 1_000
    torn = fetch("tiny/model", tmp_path, standin.url)
    assert torn.returncode == 1
    last = torn.stderr.splitlines()[-1]  # before it the library says how often it tried
    assert last.startswith("UNAVAILABLE: the download of tiny/model broke off")
    standin.torn = 0
    done = fetch("tiny/model", tmp_path, standin.url)
    assert done.returncode == 0, done.stderr
    weights = Path(done.stdout.strip()) / "model.safetensors"
    assert weights.read_bytes() == FILES["model.safetensors"]


def test_no_network(tmp_path: Path) -> None:
    with StandIn() as gone:
        url = gone.url
    done = fetch("tiny/model", tmp_path, url)
    assert done.stderr.startswith(f"UNAVAILABLE: {url} cannot be reached")


def test_no_room_and_no_right_say_where() -> None:
    full = hub.refusal("tiny/model", OSError(errno.ENOSPC, "No space left on device"))
    assert full.kind is ErrorKind.EXHAUSTED
    assert "bytes are free" in full.detail and "HF_HOME" in full.detail
    closed = hub.refusal("tiny/model", PermissionError(errno.EACCES, "Permission denied", "/x"))
    assert closed.kind is ErrorKind.DENIED
    assert closed.detail.startswith("/x cannot be written (Permission denied)")
