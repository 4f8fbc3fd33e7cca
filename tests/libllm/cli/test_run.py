"""run: which model, which request, what is printed; chats."""

from pathlib import Path

import pytest
from libllm.cli import chat as conversation
from libllm.cli import lookup
from libllm.cli.app import app
from libllm.cli.run import write
from libllm.results import Piece
from llmproto.errors import ErrorKind, RemoteError
from typer.testing import CliRunner

from .conftest import CommandLine, FakeSystem, Generation, Pieces, entry, pieces_of


def asked(system: FakeSystem) -> Generation:
    """The last generation."""
    return system.operator.generations[-1]


def test_standard_output_is_the_text(llmos: CommandLine, system: FakeSystem) -> None:
    pieces = pieces_of(" there", " was", " é")
    system.operator.streams = [pieces]
    done = llmos("run", "plain", "Once", "--max-tokens", "3", "--temperature", "0", "--seed", "1")
    assert (done.code, done.stdout, done.stderr) == (0, " there was é", "")
    kind, prompt, options = asked(system)
    assert (kind, prompt) == ("generate", "Once")
    assert options["model"] == "plain"
    assert (options["max_tokens"], options["temperature"], options["seed"]) == (3, 0.0, 1)
    assert pieces.closed


def test_a_document(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [pieces_of(" a", " b", scores=True)]
    document = llmos("run", "plain", "Once", "--json").document()
    assert document == {
        "model": "plain",
        "text": " a b",
        "tokens": [101, 102],
        "finish_reason": "length",
        "stop": None,
        "usage": {"prompt_tokens": 3, "output_tokens": 2},
        "stream": "00" * 17,
    }


def test_verbose_goes_to_standard_error(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [pieces_of("x")]
    done = llmos("run", "plain", "Once", "-v")
    assert done.stdout == "x"
    assert done.stderr.startswith("3 prompt tokens, 1 new (length)")


def test_standard_input_is_the_prompt(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [pieces_of("x")]
    llmos("run", "plain", stdin="two\nlines\n")
    assert asked(system)[1] == "two\nlines"


def test_standard_input_must_be_text(system: FakeSystem) -> None:
    result = CliRunner().invoke(app, ["run", "plain"], obj=system, input=b"\xff\xfe")
    assert result.exit_code == 1
    assert result.stderr.startswith("llmos: INVALID: standard input is not UTF-8 text")


def test_chat_makes_turns(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [pieces_of("x"), pieces_of("y")]
    llmos("run", "embedded", "Hi", "--chat")
    assert asked(system)[:2] == ("chat", [{"role": "user", "content": "Hi"}])
    llmos("run", "embedded", "Hi", "--system", "Be brief")
    assert asked(system)[1] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
    ]
    assert llmos("run", "embedded", "Hi", "--raw", "--system", "x").code == 2


def test_boots_where_nothing_is_up(llmos: CommandLine, system: FakeSystem) -> None:
    system.runs = False
    system.operator.streams = [pieces_of("x")]
    done = llmos("run", "plain", "Once")
    assert done.stdout == "x"
    assert ("boot", 60.0) in system.did
    assert "booting" in done.stderr


def test_an_interruption_cancels_and_is_exit_code_130(
    llmos: CommandLine, system: FakeSystem
) -> None:
    pieces = Pieces([Piece(text="half"), KeyboardInterrupt()])
    system.operator.streams = [pieces]
    done = llmos("run", "plain", "Once")
    assert (done.code, done.stdout) == (130, "half")
    assert pieces.closed


def test_a_failing_stream_is_a_refusal(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [Pieces([RemoteError(ErrorKind.INVALID, "600 tokens, at most 512")])]
    done = llmos("run", "plain", "Once")
    assert (done.code, done.stderr) == (1, "llmos: INVALID: 600 tokens, at most 512\n")


def test_a_folder_is_added_under_its_name(
    llmos: CommandLine, system: FakeSystem, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    system.operator.streams = [pieces_of("x"), pieces_of("y")]
    llmos("run", str(tmp_path / "tiny"), "Once")
    assert asked(system)[2]["model"] == "tiny"
    llmos("run", str(tmp_path / "tiny"), "Once")
    assert system.operator.asked.count(("add", tmp_path / "tiny", "tiny")) == 2


def test_the_hub_is_asked_for_org_and_name(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.streams = [pieces_of("x")]
    llmos("run", "org/tiny", "Once")
    assert ("fetch", "org/tiny") in system.did
    assert system.operator.asked[0] == ("add", system.folder / "snapshot", "org/tiny")


def test_an_unknown_name_lists_the_known_ones(llmos: CommandLine) -> None:
    done = llmos("run", "nosuch", "Once")
    assert done.code == 1
    assert done.stderr.startswith(
        "llmos: INVALID: no model 'nosuch': the table has embedded, plain"
    )


def test_free_names() -> None:
    rows = [entry("tiny", "/a/tiny"), entry("tiny-2", "/b/tiny")]
    assert lookup.free_name(rows, Path("/a/tiny"), "tiny") == "tiny"
    assert lookup.free_name(rows, Path("/b/tiny"), "tiny") == "tiny-2"
    assert lookup.free_name(rows, Path("/c/tiny"), "tiny") == "tiny-3"
    assert lookup.free_name(rows, Path("/c/other"), "other") == "other"


def test_write_gives_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert write(pieces_of("a", "b")) == "ab"
    assert capsys.readouterr().out == "ab"


def test_a_conversation_remembers(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    system.lines = ["Hi", "", "And?", KeyboardInterrupt()]
    broken = Pieces([Piece(text="Hal"), KeyboardInterrupt()])
    system.operator.streams = [broken, pieces_of("Well")]
    conversation.converse(system, system.operator, {}, "Be brief", chat=True)
    assert asked(system)[1] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hal"},
        {"role": "user", "content": "And?"},
    ]
    assert broken.closed
    assert capsys.readouterr().out == "Hal\nWell\n\n\n"


def test_a_refused_turn_is_forgotten(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    system.lines = ["too long", "short"]
    refused = Pieces([RemoteError(ErrorKind.INVALID, "600 tokens, at most 512")])
    system.operator.streams = [refused, pieces_of("ok")]
    conversation.converse(system, system.operator, {}, None, chat=True)
    assert asked(system)[1] == [{"role": "user", "content": "short"}]
    assert "600 tokens, at most 512" in capsys.readouterr().err


def test_without_a_template_lines_are_continued(system: FakeSystem) -> None:
    system.lines = ["Once"]
    system.operator.streams = [pieces_of("x")]
    conversation.converse(system, system.operator, {}, None, chat=False)
    assert asked(system)[:2] == ("generate", "Once")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("name", False),
        ("./org/name", False),
        ("../shared/model", False),
        ("/abs/model", False),
        ("a/b/c", False),
        ("org/", False),
    ],
)
def test_names_on_the_hub(text: str, expected: bool) -> None:
    assert bool(lookup.HUB_NAME.fullmatch(text)) is expected
