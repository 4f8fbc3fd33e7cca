"""What is read from file, environment and descriptors, and how it is refused."""

import os
from pathlib import Path

import pytest
from libllm.config import (
    Home,
    ProcessEnvironment,
    SystemConfig,
    child_environment,
    read_key,
)
from llmproto.errors import ErrorKind, RemoteError


def test_without_a_file_all_is_default(tmp_path: Path) -> None:
    config = SystemConfig.read(tmp_path / "config.toml")
    assert config == SystemConfig()
    assert (config.kernel.sync, config.gateway.host) == ("group", "127.0.0.1")
    assert (config.trainer.share_while_serving, config.trainer.cores) == (0.25, None)
    assert config.services.run == ("tokenizer", "monitor", "store", "gateway")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[executor]\nmode = "exact"\nthreads = 2\n[gateway]\nport = 0\n[models]\npreload = ["a"]\n'
    )
    config = SystemConfig.read(path)
    assert (config.executor.mode, config.executor.threads) == ("exact", 2)
    assert (config.gateway.port, config.models.preload) == (0, ("a",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[kernel]\nsink = 1\n", ["sink", "$.kernel"]),
        ("[colonel]\n", ["colonel"]),
        ('[kernel]\nsync = "often"\n', ["often", "$.kernel.sync"]),
        ("[gateway]\nport = 70000\n", ["65535", "$.gateway.port"]),
        ("[gateway\n", ["line 1"]),
        ('[models]\npreload = "a"\n', ["$.models.preload"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_key(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(RemoteError) as refused:
        SystemConfig.read(path)
    assert refused.value.kind is ErrorKind.INVALID
    for word in [str(path), *words]:
        assert word in refused.value.detail


def test_a_home_whose_socket_path_is_too_long_is_refused_with_both_numbers() -> None:
    root = "/" + "x" * 90
    Home.find(root)
    with pytest.raises(RemoteError) as refused:
        Home.find(root + "y")
    assert "108 bytes" in refused.value.detail
    assert "107" in refused.value.detail


def test_the_home_is_the_given_one_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMOS_HOME", "/somewhere")
    assert Home.find("/elsewhere").root == Path("/elsewhere")
    assert Home.find().root == Path("/somewhere")
    monkeypatch.delenv("LLMOS_HOME")
    monkeypatch.setenv("HOME", "/me")
    assert Home.find().root == Path("/me/.llmos")


def test_a_home_is_made_closed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    home.make()
    assert home.root.stat().st_mode & 0o777 == 0o700
    assert home.journal.is_dir() and home.socket.parent.is_dir()


def test_the_proof_is_taken_from_its_descriptor_which_is_closed(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, bytes(range(16)))
    os.write(writing, bytes(range(16, 32)))
    environment = ProcessEnvironment.read(
        {
            "LLMOS_HOME": str(tmp_path),
            "LLMOS_PROCESS": "executor-1",
            "LLMOS_INCARNATION": "3",
            "LLMOS_PROOF_FD": str(reading),
            "LLMOS_LIFELINE_FD": "7",
        }
    )
    os.close(writing)
    assert environment == ProcessEnvironment(
        home=Home(tmp_path),
        process="executor-1",
        incarnation=3,
        proof=bytes(range(32)),
        lifeline_fd=7,
    )
    with pytest.raises(OSError):
        os.fstat(reading)


def test_a_service_that_init_did_not_start_proves_itself_with_the_homes_key(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    home.make()
    home.service_key.write_bytes(b"k" * 32)
    assert ProcessEnvironment.read({"LLMOS_HOME": str(tmp_path)}).proof == b"k" * 32
    assert read_key(home.operator_key) == b""


def test_a_variable_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="LLMOS_INCARNATION"):
        ProcessEnvironment.read({"LLMOS_HOME": str(tmp_path), "LLMOS_INCARNATION": "x"})


def test_children_find_the_packages_where_this_process_did() -> None:
    roots = child_environment()["PYTHONPATH"].split(os.pathsep)
    assert any((Path(root) / "llmproto" / "wire.py").exists() for root in roots)


def test_the_stores_quota(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[store]\nbytes_max = 1000\n")
    assert SystemConfig.read(path).store.bytes_max == 1000
    assert SystemConfig().store.bytes_max is None
