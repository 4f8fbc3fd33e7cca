"""From configuration to what the core must know."""

from pathlib import Path

import pytest
from libllm.config import Home, SystemConfig
from llmkernel.boot import KV_BYTES_DEFAULT, WORKING_BYTES, core_config
from llmproto.errors import RemoteError
from llmproto.operation import DeviceRow

CPU = DeviceRow(name="cpu0", kind="cpu", cores=list(range(16)), memory_bytes=1 << 34)


def home(tmp_path: Path, toml: str) -> Home:
    found = Home(tmp_path)
    found.make()
    found.operator_key.write_bytes(b"o" * 32)
    found.service_key.write_bytes(b"s" * 32)
    for key in (found.operator_key, found.service_key):
        key.chmod(0o600)
    found.config.write_text(toml)
    return found


def names(tmp_path: Path, toml: str) -> list[tuple[str, str, str]]:
    at = home(tmp_path, toml)
    config = core_config(at, SystemConfig.read(at.config), (CPU,))
    return [(spec.name, spec.role, spec.module) for spec in config.services]


def test_services_run_as_modules_and_anything_else_by_its_own_name(tmp_path: Path) -> None:
    assert names(tmp_path, '[services]\nrun = ["tokenizer", "monitor", "my.plugin"]\n') == [
        ("tokenizer", "tokenizer", "llmservices.tokenizer"),
        ("monitor", "monitor", "llmservices.monitor"),
        ("my.plugin", "my.plugin", "my.plugin"),
    ]


def test_a_plugin_is_found_by_its_entry_point_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "site" / "echo-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[llmos.services]\necho = echo_plugin.main\n")
    monkeypatch.syspath_prepend(str(described.parent))
    at = tmp_path / "home"
    assert names(at, '[services]\nrun = ["echo"]\n') == [("echo", "echo", "echo_plugin.main")]


def test_a_gateway_has_as_many_workers_as_cores_allow(tmp_path: Path) -> None:
    module = "llmservices.gateway"
    assert names(tmp_path, '[services]\nrun = ["gateway"]\n') == [
        ("gateway-1", "gateway", module),
        ("gateway-2", "gateway", module),
    ]
    one = '[services]\nrun = ["gateway"]\n[gateway]\nworkers = 1\n'
    assert names(tmp_path, one) == [("gateway", "gateway", module)]


def test_several_workers_cannot_share_a_port_that_nobody_knows(tmp_path: Path) -> None:
    toml = '[services]\nrun = ["gateway"]\n[gateway]\nport = 0\nworkers = 4\n'
    assert [name for name, _, _ in names(tmp_path, toml)] == ["gateway"]


def test_an_executor_is_given_its_cache_and_its_working_memory(tmp_path: Path) -> None:
    at = home(tmp_path, "[executor]\nkv_bytes = 1048576\nthreads = 3\n")
    config = core_config(at, SystemConfig.read(at.config), (CPU,))
    assert config.executor_memory_bytes == (1 << 20) + WORKING_BYTES
    assert config.executor_cores == 3
    assert (config.operator_proof, config.service_proof) == (b"o" * 32, b"s" * 32)
    at.config.write_text("")
    config = core_config(at, SystemConfig.read(at.config), (CPU,))
    assert config.executor_memory_bytes == KV_BYTES_DEFAULT + WORKING_BYTES
    assert config.preload is None


def test_the_data_service_starts_on_demand_unless_it_is_to_run_always(tmp_path: Path) -> None:
    for toml, on_demand in (("", ["data"]), ('[services]\nrun = ["data"]\n', [])):
        at = home(tmp_path, toml)
        config = core_config(at, SystemConfig.read(at.config), (CPU,))
        assert [spec.name for spec in config.on_demand] == on_demand
    assert [spec.module for spec in config.services] == ["llmservices.data"]


def test_what_jobs_may_take(tmp_path: Path) -> None:
    at = home(tmp_path, "[trainer]\nshare_while_serving = 0.5\ncores = 3\n")
    config = core_config(at, SystemConfig.read(at.config), (CPU,))
    assert (config.job_share, config.job_cores, config.run_folder) == (0.5, 3, str(at.run))
    with pytest.raises(RemoteError, match="share_while_serving"):
        SystemConfig.read(home(tmp_path, "[trainer]\nshare_while_serving = 0\n").config)
