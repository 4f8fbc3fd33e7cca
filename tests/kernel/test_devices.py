"""Device detection against sample trees of /proc and /sys, and against this very system."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmkernel import cgroup, devices

GIB = 1 << 30
MEMINFO = "MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   16777216 kB\n"
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
V1_OWN = "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n0::/a/b\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    """A root folder with these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v2(root: Path, files: dict[str, str], own: str = "/a/b") -> Path:
    """Version 2, in the group /a/b."""
    groups = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    proc = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": V2, "proc/meminfo": MEMINFO}
    return tree(root, groups | proc)


def v1(root: Path, files: dict[str, str], mounts: str = V1) -> Path:
    """Version 1 beside an empty version 2, in the group /a/b."""
    groups = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    proc = {"proc/self/cgroup": V1_OWN, "proc/self/mountinfo": mounts, "proc/meminfo": MEMINFO}
    return tree(root, groups | proc)


def test_without_groups_everything_installed_is_there(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO})
    assert devices.cpu_quota(root) is None
    assert devices.memory(root) == devices.Memory(32 * GIB, 16 * GIB)
    row = devices.cpu_set(root, [0, 2, 3])
    assert (row.kind, row.cores, row.memory_bytes) == ("cpu", [0, 2, 3], 32 * GIB)


def test_v2_the_tightest_group_on_the_path_counts(tmp_path: Path) -> None:
    files = {
        "a/b/cpu.max": "max 100000\n",
        "a/cpu.max": "250000 100000\n",
        "a/b/memory.max": f"{8 * GIB}\n",
        "a/b/memory.high": "max\n",
        "a/b/memory.current": f"{3 * GIB}\n",
        "a/b/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "a/memory.max": "max\n",
        "a/memory.high": f"{4 * GIB}\n",
        "a/memory.current": f"{3 * GIB}\n",
    }
    root = v2(tmp_path, files)
    assert devices.cpu_quota(root) == 2.5
    assert devices.memory(root) == devices.Memory(4 * GIB, GIB)
    row = devices.cpu_set(root, list(range(8)))
    assert row.cores == [0, 1]
    assert row.detail == "2 of 8 cores, quota 2.5, 1024 MiB free"


def test_v1_quota_and_limit(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/a/b/memory.usage_in_bytes": "77\n",
        "memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/a/memory.usage_in_bytes": f"{2 * GIB}\n",
        "memory/a/memory.stat": f"total_inactive_file {GIB}\n",
    }
    root = v1(tmp_path, files)
    assert devices.cpu_quota(root) == 0.5
    assert devices.memory(root) == devices.Memory(2 * GIB, GIB)
    assert devices.cpu_set(root, [4, 5]).cores == [4]


@pytest.mark.parametrize("own", ["/", "/../../outside", "/not/there"])
def test_in_a_container_the_mount_is_the_own_group(tmp_path: Path, own: str) -> None:
    root = v2(tmp_path, {"memory.max": f"{GIB}\n", "memory.current": "0\n"}, own)
    assert devices.memory(root) == devices.Memory(GIB, GIB)


def test_v1_in_a_container_the_mounted_part_is_the_own_group(tmp_path: Path) -> None:
    mounts = V1.replace("0:32 / ", "0:32 /a/b ")
    root = v1(tmp_path, {"memory/memory.limit_in_bytes": f"{GIB}\n"}, mounts)
    assert devices.memory(root).bytes_max == GIB


def test_oom_files_are_found_in_either_version(tmp_path: Path) -> None:
    first = v1(tmp_path / "1", {"memory/a/b/memory.oom_control": "under_oom 0\noom_kill 3\n"})
    assert cgroup.read_fields(cgroup.folders(first, "memory")[0] / "memory.oom_control") == {
        "under_oom": 0,
        "oom_kill": 3,
    }
    assert not cgroup.is_unified(first, "memory")
    second = v2(tmp_path / "2", {"a/b/memory.events": "oom 1\noom_kill 1\n"})
    assert cgroup.is_unified(second, "memory")


@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=60))
def test_garbage_bounds_nothing(
    tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str
) -> None:
    root = v2(tmp_path_factory.mktemp("root"), {"cpu.max": c, "memory.max": c})
    tree(root, {"proc/self/cgroup": a, "proc/self/mountinfo": b + "\n" + V2})
    quota = devices.cpu_quota(root)
    assert quota is None or quota >= 0
    assert devices.memory(root).bytes_max <= 32 * GIB


class FakeNvml:
    """Two GPUs, the first of which is lost."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True) -> None:
        self._driver = driver
        self.running = False

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError
        self.running = True

    def nvmlShutdown(self) -> None:
        self.running = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 0:
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB)

    def nvmlDeviceGetName(self, device: int) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetUUID(self, device: int) -> str:
        return "GPU-1"


def test_gpus_come_from_nvml() -> None:
    nvml = FakeNvml()
    (row,) = devices.gpus(nvml, [0, 1])
    assert (row.name, row.kind, row.cores) == ("cuda:1", "cuda", [0, 1])
    assert (row.memory_bytes, row.detail) == (80 * GIB, "NVIDIA H100 GPU-1")
    assert not nvml.running


def test_no_driver_is_no_gpu() -> None:
    assert devices.gpus(FakeNvml(driver=False), [0]) == []


def test_this_system_has_a_cpu() -> None:
    cpu = devices.detect()[0]
    assert cpu.kind == "cpu"
    assert set(cpu.cores) <= set(devices.allowed_cores())
    assert len(cpu.cores) >= 1
    assert cpu.memory_bytes > 1 << 20
