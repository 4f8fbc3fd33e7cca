"""Bad input, over real processes: a clear refusal, and nothing lost.

Whatever was refused, the system that refused it is the same one afterwards: the same processes, no
thread left.
"""

import json
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llmproto.errors import ErrorKind, RemoteError
from llmservices.models import embedded_make

import libllm

from .conftest import System, run_llmos

MODEL = "llmos-mini"
EMBEDDED = Path(embedded_make.__file__).parent / "embedded"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path: that of a Unix socket is at most 107 bytes."""
    root = Path(tempfile.mkdtemp(prefix="llmos-"))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def unharmed(served: System) -> Iterator[System]:
    """The system; afterwards it consists of the same processes, and holds no thread."""

    def processes(llm: libllm.Client) -> dict[str, int | None]:
        return {row.name: row.pid for row in llm.ps() if not row.name.startswith("executor")}

    with libllm.connect(served.home.root) as llm:
        before, models = processes(llm), llm.models()
        yield served
        assert processes(llm) == before
        assert [row.model for row in llm.models()] == [row.model for row in models]
        deadline = time.monotonic() + 10
        while llm.threads() or not llm.status().ready:
            assert time.monotonic() < deadline, llm.threads()
            time.sleep(0.02)


def refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """What was said on standard error: for exit code 1 one line; never a traceback."""
    assert done.returncode == code, (done.args, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 1:
        assert done.stderr.startswith("llmos: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def refusals(home: Path, commands: Sequence[Sequence[str]]) -> list[str]:
    """Of several commands, some at a time."""

    def run(command: Sequence[str]) -> str:
        return refusal(run_llmos(*command, home=home))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, commands))


# --- models ---------------------------------------------------------------------------------------


def broken_folders(root: Path) -> dict[str, str]:
    """Halves of model folders, by path, and what the refusal of each must say."""
    expected: dict[str, str] = {}

    def folder(name: str, says: str) -> Path:
        made = root / name
        shutil.copytree(EMBEDDED, made)
        expected[str(made)] = says
        return made

    (folder("no-weights", "has no weights") / "model.safetensors").unlink()
    whole = (EMBEDDED / "model.safetensors").read_bytes()
    (folder("torn", "200000 bytes") / "model.safetensors").write_bytes(whole[:200_000])
    huge = struct.pack("<Q", 1 << 62) + whole[8:]
    (folder("huge-header", "model.safetensors") / "model.safetensors").write_bytes(huge)
    (folder("no-tokenizer", "tokenizer.json is missing") / "tokenizer.json").unlink()
    (folder("torn-tokenizer", "tokenizer.json") / "tokenizer.json").write_text('{"version"')
    (folder("torn-config", "config.json: is broken") / "config.json").write_text('{"a":')
    (folder("list-config", "config.json") / "config.json").write_text("[]")
    (folder("no-config", "config.json is missing") / "config.json").unlink()
    pickled = folder("pickled", "pytorch_model.bin")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    sharded = folder("shard-missing", "model-00002-of-00002.safetensors")
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    outside = folder("shard-outside", "..")
    (outside / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../torn/model.safetensors"}}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    empty = root / "empty"
    empty.mkdir()
    expected[str(empty)] = "config.json is missing"
    expected[str(root / "nothing")] = "is not there"
    expected[str(outside / "config.json")] = ""
    return expected


def test_models_that_cannot_be(unharmed: System, place: Path) -> None:
    """None of them enters the table; each refusal names what is wrong."""
    expected = broken_folders(place)
    with libllm.connect(unharmed.home.root) as llm:
        for path, wanted in expected.items():
            with pytest.raises(RemoteError) as caught:
                llm.add_model(path)
            assert caught.value.kind is ErrorKind.INVALID, (path, caught.value)
            assert wanted in caught.value.detail and path in caught.value.detail, caught.value
    folders = [path for path in expected if "torn" in path or "nothing" in path]
    commands = [["run", path, "hello"] for path in folders]
    for path, line in zip(folders, refusals(unharmed.home.root, commands), strict=True):
        assert line.startswith("llmos: INVALID: ") and path in line, line
    unknown = refusal(run_llmos("run", "no-such-model", "x", home=unharmed.home.root))
    assert "no-such-model" in unknown and MODEL in unknown


def test_remote_code_is_refused(unharmed: System, place: Path) -> None:
    """Where only code of the folder's own could run it."""
    folder = place / "remote-code"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    config["architectures"] = ["MineForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(run_llmos("run", str(folder), "hello", home=unharmed.home.root))
    assert "INVALID" in said and "code" in said and str(folder) in said
    assert run_llmos("rm", "remote-code", home=unharmed.home.root).returncode == 0


def test_a_model_whose_folder_vanished(unharmed: System, place: Path) -> None:
    """A typed error that names the path, however often it is asked for."""
    folder = place / "brief"
    shutil.copytree(EMBEDDED, folder)
    with libllm.connect(unharmed.home.root) as llm:
        llm.add_model(folder, "brief")
        try:
            shutil.rmtree(folder)
            for _ in range(2):
                with pytest.raises(RemoteError) as caught:
                    llm.generate("A list is", model="brief", max_tokens=4, deadline_s=60)
                assert str(folder) in caught.value.detail
                assert caught.value.kind is not ErrorKind.INTERNAL
            assert llm.generate("A list is", model=MODEL, max_tokens=4).usage.output_tokens == 4
        finally:
            llm.remove_model("brief")


# --- requests -------------------------------------------------------------------------------------

LONG = "word " * 3000
WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": float("nan")}, "top_p"),
    ({"min_p": -0.5}, "min_p"),
    ({"top_k": -3}, "top_k"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"logit_bias": {1: 1e9}}, "bias_values"),
    ({"logit_bias": {999_999: 1.0}}, "2048"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "1024"),
    ({"stop": ["x"] * 100}, "16"),
    ({"stop": ""}, "stops"),
    ({"stop": "x" * 1000}, "256"),
    ({"stop_tokens": [999_999]}, "2048"),
    ({"n": 0}, "choices"),
    ({"n": 1000}, "128"),
    ({"max_tokens": -1}, "output_tokens_max"),
    ({"max_tokens": 10**12}, "output_tokens_max"),
    ({"max_tokens": 10**30}, ""),
    ({"max_tokens": 5000}, "5003"),
    ({"logprobs": 1000}, "20"),
    ({"seed": -1}, "seed"),
    ({"priority": 99}, "priority"),
    ({"service_class": 9}, "service_class"),
    ({"model": "no-such-model"}, "no-such-model"),
    ({"model": "x" * 1000}, "model"),
    ({"colour": "red"}, "colour"),
)


def test_wrong_requests(unharmed: System) -> None:
    """INVALID, naming the field or the number that it breaks."""
    with libllm.connect(unharmed.home.root) as llm:
        for options, wanted in WRONG:
            with pytest.raises(RemoteError) as caught:
                # Options are checked at run time, whatever their types say.
                llm.generate("A list", **{"max_tokens": 2, **options})
            assert caught.value.kind is ErrorKind.INVALID, (options, caught.value)
            assert wanted in caught.value.detail, (options, caught.value.detail)
        prompts: list[tuple[str | list[int], str]] = [
            (LONG, "6001"),
            (LONG, "1024"),
            ("x" * 1_000_000, "900000"),
            ([], "empty"),
            ([999_999], "2048"),
            ([-1], ""),
        ]
        for prompt, wanted in prompts:
            with pytest.raises(RemoteError) as caught:
                llm.generate(prompt, max_tokens=2)
            assert caught.value.kind is ErrorKind.INVALID, caught.value
            assert wanted in caught.value.detail, caught.value.detail
        with pytest.raises(RemoteError, match="role"):
            llm.chat([{"role": "user"}], max_tokens=2)
        assert llm.generate("", max_tokens=2, ignore_eos=True).usage.output_tokens == 2


def test_wrong_options_of_run(unharmed: System) -> None:
    home = unharmed.home.root
    wrong = [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--max-tokens", "1000000000000"],
        ["--stop", ""],
    ]
    for line in refusals(home, [["run", MODEL, "A list", *options] for options in wrong]):
        assert line.startswith("llmos: INVALID: "), line
    assert "integer" in refusal(run_llmos("run", MODEL, "x", "--max-tokens", "x", home=home), 2)
    long = refusal(run_llmos("run", MODEL, LONG, home=home))
    assert "6001" in long and "1024" in long
