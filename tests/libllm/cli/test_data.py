"""data clean, inspect, augment: what is asked of the data service, what is shown."""

from llmproto.data import DataAugment, DataClean, DataColumn, DataInspect, DataReport
from llmproto.recipes import AugmentOptions, CleanOptions, DataRecipe

from .conftest import CommandLine, FakeSystem


def test_clean(llmos: CommandLine, system: FakeSystem) -> None:
    system.operator.report = DataReport(
        "chat", 9, 7, dropped={"duplicate": 2}, changed={"masked": 1}, bad=["a:3: no text"]
    )
    output = llmos(
        "data", "clean", "/in.jsonl", "-o", "/out.jsonl", "--duplicates", "near", "--mask",
        "email, key", "--set", "near_similarity=0.5", "--format", "chat", "--rows",
    )  # fmt: skip
    assert output.code == 0, output.stderr
    options = CleanOptions(duplicates="near", mask=["email", "key"], near_similarity=0.5)
    assert system.operator.asked == [
        DataClean(["/in.jsonl"], "/out.jsonl", options, DataRecipe(format="chat"), rows=True)
    ]
    assert "9 rows in, 7 out" in output.stdout
    assert "dropped         2  duplicate" in output.stdout
    assert "bad      a:3: no text" in output.stdout


def test_clean_refuses_what_the_schema_does_not_know(llmos: CommandLine) -> None:
    output = llmos("data", "clean", "/in.jsonl", "-o", "/out", "--duplicates", "some")
    assert output.code == 1
    assert "duplicates: Invalid enum value 'some'" in output.stderr


def test_augment(llmos: CommandLine, system: FakeSystem) -> None:
    arguments = ("--swap", "0.1", "--synonyms", "/words", "--overwrite")
    assert llmos("data", "augment", "/in.jsonl", "-o", "/out.jsonl", *arguments).code == 0
    options = AugmentOptions(swap=0.1, synonyms="/words")
    assert system.operator.asked == [
        DataAugment(["/in.jsonl"], "/out.jsonl", options, overwrite=True)
    ]


def test_inspect(llmos: CommandLine, system: FakeSystem) -> None:
    columns = [DataColumn("label", "str", values={"yes": 2}, characters=[1, 2, 3, 4])]
    system.operator.report = DataReport("text", 3, 3, columns=columns, tokens=17)
    system.runs = False
    output = llmos("data", "inspect", "/in.jsonl", "--tokenizer", "/m")
    assert system.operator.asked == [DataInspect(["/in.jsonl"], tokenizer="/m")]
    assert system.did[0] == ("boot", 60.0)
    assert "17 tokens" in output.stdout
    assert "yes (2)" in output.stdout
    document = llmos("data", "inspect", "/in.jsonl", "--json").document()
    assert isinstance(document, dict)
    assert document["rows_in"] == 3
