"""PROTOCOL.md is what the schema says today, and says all of it."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from llmproto import limits, render
from llmproto.kinds import KINDS
from msgspec import inspect as types

PROTOCOL = Path(render.__file__).parents[1] / "PROTOCOL.md"


@pytest.fixture(scope="module")
def text() -> str:
    return render.protocol_text()


def test_protocol_md_is_not_stale(text: str) -> None:
    assert PROTOCOL.read_text(encoding="utf-8") == text, (
        "PROTOCOL.md is stale: run python -m llmproto.render with proto on the path"
    )


def test_main_writes_where_it_is_told(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render.main([str(tmp_path / "told.md")])
    monkeypatch.setattr(render, "__file__", str(tmp_path / "llmproto" / "render.py"))
    render.main([])
    assert (tmp_path / "told.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "PROTOCOL.md").read_text(encoding="utf-8") == text


def test_the_module_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["render", str(tmp_path / "run.md")])
    runpy.run_path(render.__file__, run_name="__main__")
    assert (tmp_path / "run.md").read_text(encoding="utf-8") == text


def test_every_kind_and_field_is_described(text: str) -> None:
    for kind, struct in KINDS.items():
        _, _, chapter = text.partition(f"#### {struct.__name__} 0x{kind:04x}\n")
        chapter = chapter.partition("\n#### ")[0]
        for field in struct.__struct_fields__:
            assert f"| `{field}` |" in chapter, f"{struct.__name__}.{field}"


def test_no_placeholder_is_left(text: str) -> None:
    assert "{{" not in text


def test_headings_are_unique_and_links_lead_to_them(text: str) -> None:
    headings = re.findall(r"^#### (.+)$", text, re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors)


def test_every_limit_has_its_reason(text: str) -> None:
    chapter = text.partition("## 14. Limits\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", chapter, re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in vars(limits) if name.isupper()]
    assert [name for name, reason in rows if not reason] == []


def test_examples_in_hexadecimal_are_there(text: str) -> None:
    assert "a4 72 6f 6c 65 a6 63 6c 69 65 6e 74    # role" in text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (types.IntType(), "`int`"),
        (types.IntType(gt=0, lt=9), "`int` 1..8"),
        (types.FloatType(), "`float`"),
        (types.FloatType(gt=0.0, lt=2.5), "`float` > 0 and < 2.5"),
        (types.StrType(), "`str`"),
        (types.StrType(min_length=2), "`str` (at least 2 characters)"),
        (types.StrType(pattern="^(a|b)$"), "`str` matching `^(a\\|b)$`"),
        (types.BytesType(min_length=8, max_length=8), "`bin` (8 bytes)"),
        (types.DictType(types.StrType(), types.BoolType()), "map of `bool`"),
        (types.UnionType((types.BoolType(), types.NoneType())), "`bool` or `nil`"),
    ],
)
def test_types_are_spelled_with_their_ranges(kind: types.Type, expected: str) -> None:
    assert render.type_text(kind) == expected


def test_types_outside_the_protocol_are_refused() -> None:
    with pytest.raises(TypeError, match="not a type of the protocol"):
        render.type_text(types.DateTimeType())
