"""The real `llmos` script, on copies of a checkout whose interpreter and pip are stand-ins.

Only the tests of the environment itself make a real one; none reaches a network.
"""

import ensurepip
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINOR = sys.version_info.minor
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Logs what it is asked, answers for pip and for llmos, and leaves the rest to a real interpreter.
# With STARTED and GO set (named pipes), its pip says that it runs and waits to be let go.
STUB_PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >>"$LOG"
case "$*" in
"-P -m pip --version") ;;
"-P -m pip index versions torch") echo "torch (9.9)"; echo "Available versions: $OFFERED" ;;
"-P -m pip "*)
    if [ -n "${STARTED-}" ]; then echo started >"$STARTED"; read -r _ <"$GO"; fi ;;
"-P -m libllm.cli"*) shift 3; printf '<%s>\\n' llmos "$@" ;;
"-P "*/tests/run.py*) shift 2; printf '<%s>\\n' test "$@" ;;
*) exec "$REAL" "$@" ;;
esac
"""

# A real interpreter in all but one thing: the standard library lacks ensurepip, as Debian's may.
NO_ENSUREPIP = """#!/bin/sh
case "$*" in
*ensurepip*) exit 1 ;;
*sys.base_prefix*sys.executable* | *sys.executable*sys.base_prefix*) echo "$0" ;;
*) exec "$REAL" "$@" ;;
esac
"""

cpu_only = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64")
    or Path("/dev/nvidiactl").exists()
    or Path("/proc/driver/nvidia/version").exists(),
    reason="the CPU build of torch is chosen on Linux x86-64 without an NVIDIA driver",
)


def write_script(path: Path, text: str) -> Path:
    """Put an executable script there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what the launcher needs, with an environment in which it calls its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "a checkout"
        self.root.mkdir()
        (self.root / ".ci").mkdir()
        for name in ("llmos", "pyproject.toml", ".ci/run"):
            shutil.copy(ROOT / name, self.root / name)
        self.stubs = folder / "stubs"
        self.stubs.mkdir()
        self.log = folder / "log"
        base = Path(sys.base_prefix, "bin", f"python3.{MINOR}")
        self.env = {
            "PATH": f"{self.stubs}:/usr/bin:/bin",
            "HOME": str(folder),
            "LOG": str(self.log),
            "OFFERED": "2.13.0",
            "REAL": str(base),
            "LLMOS_PYTHON": str(base),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_RETRIES": "0",
            # Nobody listens there: whatever would go to a network fails at once.
            "https_proxy": "http://127.0.0.1:9",
        }

    def with_venv(self, *, torch: str | None = "2.13.0+cpu") -> "Checkout":
        """Add a stand-in environment, with that version of torch in it."""
        write_script(self.root / ".venv/bin/python", STUB_PYTHON)
        (self.root / ".venv/pyvenv.cfg").write_text("version = 3\n")
        if torch is not None:
            self.package(f"torch-{torch}").joinpath("INSTALLER").touch()
        return self

    def package(self, name: str) -> Path:
        """Add the metadata folder of a package to the environment, as a killed pip leaves it."""
        site = self.root / f".venv/lib/python3.{MINOR}/site-packages"
        folder = site / f"{name}.dist-info"
        folder.mkdir(parents=True)
        return folder

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start the launcher in the folder above, in its own process group."""
        return subprocess.Popen(
            [str(self.root / "llmos"), *arguments],
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the launcher to its end."""
        with self.start(*arguments, **env) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def installed(self) -> list[str]:
        """What pip was told to install, in order, since this was asked last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        start = "-P -m pip install "
        return [line.removeprefix(start) for line in lines if line.startswith(start)]

    def editable(self, extras: str) -> str:
        """The arguments that install this checkout."""
        return f"-qq --editable {self.root}[{extras}]"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh checkout, in a folder with a space in its name."""
    return Checkout(tmp_path)


# Refusals: one line, exit 1, before anything is made.


@pytest.mark.parametrize(
    ("uname", "reason"),
    [
        ("MINGW64_NT-10.0-19045 x86_64", "Windows"),
        ("MSYS_NT-10.0 x86_64", "Windows"),
        ("CYGWIN_NT-10.0 x86_64", "Windows"),
        ("Darwin x86_64", "Intel"),
    ],
)
def test_refuses_platforms_even_with_an_environment(
    checkout: Checkout, uname: str, reason: str
) -> None:
    write_script(checkout.stubs / "uname", f"#!/bin/sh\necho '{uname}'\n")
    done = checkout.with_venv().run("ps")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert reason in done.stderr


def test_refuses_a_named_interpreter_that_does_not_run(checkout: Checkout) -> None:
    done = checkout.run("ps", LLMOS_PYTHON="/nonexistent")
    assert done.returncode == 1
    assert done.stderr == (
        "llmos: LLMOS_PYTHON=/nonexistent is not a working CPython 3.11 or newer\n"
    )
    assert not (checkout.root / ".venv").exists()


def hide_interpreters(checkout: Checkout) -> None:
    """Make every name that the launcher tries a script that fails, as a version manager's does."""
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3"):
        write_script(checkout.stubs / name, "#!/bin/sh\nexit 127\n")


def test_refuses_when_every_interpreter_is_too_old(checkout: Checkout) -> None:
    hide_interpreters(checkout)
    old = "#!/bin/sh\n[ \"$*\" = '-I --version' ] && echo Python 3.9.2\n"
    write_script(checkout.stubs / "python3", old)
    done = checkout.run("ps", LLMOS_PYTHON="")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "needs CPython 3.11 or newer and found Python 3.9.2" in done.stderr


def test_refuses_when_no_interpreter_works(checkout: Checkout) -> None:
    hide_interpreters(checkout)
    done = checkout.run("ps", LLMOS_PYTHON="")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "found no working python3" in done.stderr


# The environment.


def test_takes_the_newest_interpreter_that_works(checkout: Checkout) -> None:
    hide_interpreters(checkout)
    for name in ("python3.12", "python3.11"):
        write_script(checkout.stubs / name, NO_ENSUREPIP)
    done = checkout.run("ps", LLMOS_PYTHON="")
    assert f"({checkout.stubs}/python3.12)" in done.stderr


def test_names_the_missing_package_when_no_index_is_configured(checkout: Checkout) -> None:
    python = write_script(checkout.stubs / "python", NO_ENSUREPIP)
    done = checkout.run("ps", LLMOS_PYTHON=str(python))
    assert done.returncode == 1
    assert f"install the package python3.{MINOR}-venv" in done.stderr.splitlines()[-1]


def bundled_pip() -> Path:
    """The wheel of pip that the standard library carries."""
    wheels = sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    return wheels[0] if wheels else pytest.skip("this distribution keeps pip's wheel elsewhere")


def index_with_pip(folder: Path, digest: str | None) -> str:
    """Lay out a package index (PEP 503) that offers pip, and return its address."""
    wheel = bundled_pip()
    project = folder / "simple/pip"
    project.mkdir(parents=True)
    shutil.copy(wheel, folder / wheel.name)
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    newer = "<a href='../../pip-99.0-py3-none-any.whl#sha256=00' data-requires-python='&gt;=3.99'>"
    link = f"<a href='../../{wheel.name}#sha256={digest}'>{wheel.name}</a>"
    (project / "index.html").write_text(f"{newer}pip-99.0-py3-none-any.whl</a>{link}")
    return (folder / "simple").as_uri()


def test_takes_pip_from_the_configured_index_without_ensurepip(checkout: Checkout) -> None:
    python = write_script(checkout.stubs / "python", NO_ENSUREPIP)
    index = index_with_pip(checkout.folder, None)
    done = checkout.run("ps", LLMOS_PYTHON=str(python), PIP_INDEX_URL=index)
    # There is no torch in that index and no network: the failure says what to do, and pip stays.
    assert done.returncode == 1
    assert "run this again" in done.stderr.splitlines()[-1]
    assert (checkout.root / ".venv/bin/pip").exists()
    assert not (checkout.root / ".venv.making").exists()


def test_refuses_a_pip_that_is_not_what_its_index_says(checkout: Checkout) -> None:
    python = write_script(checkout.stubs / "python", NO_ENSUREPIP)
    index = index_with_pip(checkout.folder, "0" * 64)
    done = checkout.run("ps", LLMOS_PYTHON=str(python), PIP_INDEX_URL=index)
    assert done.returncode == 1
    assert "sha256 differs" in done.stderr


def test_remakes_an_environment_whose_making_was_cut_short(checkout: Checkout) -> None:
    python = write_script(checkout.stubs / "python", NO_ENSUREPIP)
    checkout.with_venv().run("ps")
    assert checkout.run("ps").returncode == 0
    (checkout.root / ".venv.making").touch()
    done = checkout.run("ps", LLMOS_PYTHON=str(python))
    assert "making .venv" in done.stderr
    assert done.returncode == 1
    assert not (checkout.root / ".venv/llmos-stamp").exists()


def test_remakes_the_environment_for_another_named_interpreter(checkout: Checkout) -> None:
    checkout.with_venv().run("ps")
    assert checkout.run("ps", LLMOS_PYTHON="").stderr == ""
    same = checkout.stubs / "same"
    same.symlink_to(checkout.env["REAL"])
    assert "making" not in checkout.run("ps", LLMOS_PYTHON=str(same)).stderr
    text = NO_ENSUREPIP.replace("*ensurepip*)", "*'sys.version)') echo 3.99 ;;\n*ensurepip*)")
    other = write_script(checkout.stubs / "other", text)
    assert f"({other})" in checkout.run("ps", LLMOS_PYTHON=str(other)).stderr


def test_forgets_packages_that_a_killed_pip_left_half_installed(checkout: Checkout) -> None:
    checkout.with_venv()
    half, whole = checkout.package("half-1.0"), checkout.package("whole-1.0")
    (whole / "INSTALLER").touch()
    assert checkout.run("ps").returncode == 0
    assert (half.exists(), whole.exists()) == (False, True)


# The stamp.


def test_installs_once_and_then_starts_nothing_but_the_command(checkout: Checkout) -> None:
    checkout.with_venv()
    assert checkout.run("ps").returncode == 0
    assert checkout.installed() == [checkout.editable("serve")]
    done = checkout.run("ps")
    assert (done.stdout, done.stderr) == ("<llmos>\n<ps>\n", "")
    assert checkout.log.read_text() == "-P -m libllm.cli ps\n"


def test_installs_again_when_the_project_or_the_interpreter_changes(checkout: Checkout) -> None:
    checkout.with_venv().run("ps")
    for changed in ("pyproject.toml", ".venv/pyvenv.cfg"):
        with (checkout.root / changed).open("a") as file:
            file.write("# changed\n")
        checkout.installed()
        checkout.run("ps")
        assert checkout.installed() == [checkout.editable("serve")], changed


def test_installs_again_in_a_checkout_that_has_moved(checkout: Checkout) -> None:
    checkout.with_venv().run("ps")
    checkout.installed()
    checkout.root = checkout.root.rename(checkout.folder / "elsewhere")
    checkout.run("ps")
    assert checkout.installed() == [checkout.editable("serve")]


def test_the_test_command_adds_its_tools_and_they_stay(checkout: Checkout) -> None:
    checkout.with_venv().run("ps")
    checkout.installed()
    assert checkout.run("test", "--long", "-k", "a b").stdout == "<test>\n<--long>\n<-k>\n<a b>\n"
    assert checkout.installed() == [checkout.editable("serve,train,dev")]
    checkout.run("ps")
    assert checkout.installed() == []
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run("ps")
    assert checkout.installed() == [checkout.editable("serve,train,dev")]


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("run x", "serve"),
        ("demo", "serve"),
        ("bench cpu", "serve"),
        ("train recipe.toml", "serve,train"),
        ("train", "serve,train"),
        ("eval x", "serve,train"),
        ("data clean", "serve,train"),
        ("demo train", "serve,train"),
        ("bench train", "serve,train"),
        ("bench data", "serve,train"),
        ("bench store", "serve,train"),
    ],
)
def test_each_command_installs_what_it_needs(checkout: Checkout, command: str, extras: str) -> None:
    checkout.with_venv()
    assert checkout.run(*command.split()).returncode == 0
    assert checkout.installed() == [checkout.editable(extras)]


def test_what_training_needs_stays(checkout: Checkout) -> None:
    checkout.with_venv().run("ps")
    checkout.run("train", "x")
    checkout.installed()
    checkout.run("ps")
    assert checkout.installed() == []
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run("ps")
    assert checkout.installed() == [checkout.editable("serve,train")]
    checkout.run("test")
    assert checkout.installed() == [checkout.editable("serve,train,dev")]


def test_continuous_integration_runs_the_test_command(checkout: Checkout) -> None:
    checkout.with_venv()
    done = subprocess.run(
        [checkout.root / ".ci/run"], env=checkout.env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "<test>\n"


# The hand-over.


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_hands_arguments_over_unchanged_through_a_link(checkout: Checkout, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    checkout.with_venv()
    (checkout.folder / "bin").mkdir()
    first, second = checkout.folder / "bin/first", checkout.folder / "bin/second"
    first.symlink_to("../a checkout/llmos")
    second.symlink_to(first)
    arguments = ["run", "", "Once upon  a time", "*", "--", "-x", "$HOME"]
    done = subprocess.run(
        [shell, second, *arguments],
        cwd="/",
        env=checkout.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "".join(f"<{argument}>\n" for argument in ["llmos", *arguments])


# Two at once.


def held_installation(checkout: Checkout) -> tuple[subprocess.Popen[str], Path]:
    """Start an installation that is in the middle of pip; writing to the path lets it go on."""
    started, go = checkout.folder / "started", checkout.folder / "go"
    os.mkfifo(started)
    os.mkfifo(go)
    process = checkout.start("ps", STARTED=str(started), GO=str(go))
    assert started.read_text() == "started\n"
    return process, go


def test_the_second_of_two_waits_and_finds_it_done(checkout: Checkout) -> None:
    first, go = held_installation(checkout.with_venv())
    second = checkout.start("status")
    with first, second:
        assert second.stderr is not None
        assert second.stderr.readline() == (
            f"llmos: waiting for another installation in {checkout.root}\n"
        )
        go.write_text("go\n")
        assert first.communicate()[0] == "<llmos>\n<ps>\n"
        assert second.communicate()[0] == "<llmos>\n<status>\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert checkout.installed() == [checkout.editable("serve")]


def test_a_killed_installation_leaves_nothing_to_wait_for(checkout: Checkout) -> None:
    first, _ = held_installation(checkout.with_venv())
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = checkout.run("ps")
    assert done.stdout == "<llmos>\n<ps>\n"
    assert "waiting" not in done.stderr
    assert checkout.installed() == [checkout.editable("serve")] * 2


# torch.


def torch_installed(checkout: Checkout, **env: str) -> str:
    """What pip was told about torch, in an environment without it."""
    assert checkout.with_venv(torch=None).run("ps", **env).returncode == 0
    torch, rest = checkout.installed()
    assert rest == checkout.editable("serve")
    return torch


@cpu_only
def test_takes_a_cpu_build_that_the_configured_sources_offer(checkout: Checkout) -> None:
    offered = "2.14.0+cpu, 2.13.1, 2.13.0+cu126, 2.13.0+cpu, 2.13.0, 2.12.1+cpu"
    assert torch_installed(checkout, OFFERED=offered) == "--no-deps torch==2.13.0+cpu"


@cpu_only
def test_takes_the_public_cpu_index_otherwise_and_says_the_size(checkout: Checkout) -> None:
    checkout.with_venv(torch=None)
    done = checkout.run("ps", OFFERED="2.14.0+cpu, 2.13.0")
    assert checkout.installed()[0] == f"--no-deps --index-url {CPU_INDEX} torch==2.13.*"
    assert "a download of about 190 MB" in done.stderr


@cpu_only
def test_asks_the_cpu_index_for_the_size(checkout: Checkout) -> None:
    wheel = f"torch-2.13.0%2Bcpu-cp3{MINOR}-cp3{MINOR}-manylinux_2_28_x86_64.whl"
    project = checkout.folder / "cpu/torch"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f"<a href='../{wheel}'></a><a href='../other.whl'></a>")
    with (checkout.folder / "cpu" / wheel.replace("%2B", "+")).open("wb") as file:
        file.truncate(123_000_000)
    script = checkout.root / "llmos"
    script.write_text(script.read_text().replace(CPU_INDEX, (checkout.folder / "cpu").as_uri()))
    assert "a download of 123 MB" in checkout.with_venv(torch=None).run("ps").stderr


@cpu_only
def test_leaves_the_choice_to_pip_when_indexes_are_off(checkout: Checkout) -> None:
    assert torch_installed(checkout, PIP_NO_INDEX="1") == "torch==2.13.*"


def test_takes_the_default_build_with_an_nvidia_driver(checkout: Checkout) -> None:
    write_script(checkout.stubs / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert torch_installed(checkout) == "torch==2.13.*"


def test_replaces_a_torch_of_another_series(checkout: Checkout) -> None:
    checkout.with_venv(torch="2.12.1").run("ps")
    assert "torch==2.13" in checkout.installed()[0]
