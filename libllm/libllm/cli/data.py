"""Commands on data files: clean, inspect, augment."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from libllm.cli.options import HomeOption, JsonOption, SetOption, operating, sets_of
from libllm.cli.output import console, print_json

if TYPE_CHECKING:
    from llmproto.data import DataReport
    from llmproto.recipes import DataRecipe

app = typer.Typer(
    name="data",
    help="Clean, inspect and augment data files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Inputs = Annotated[list[str], typer.Argument(metavar="IN...", help="Files or folders.")]
OutputOption = Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="A .jsonl file.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
FormatOption = Annotated[
    str, typer.Option("--format", help="auto, text, chat, alpaca, sharegpt, classification, ...")
]


@app.command()
def clean(
    context: typer.Context,
    inputs: Inputs,
    output: OutputOption,
    duplicates: Annotated[
        str, typer.Option("--duplicates", help="Drop none, exact or near ones.")
    ] = "exact",
    normalize: Annotated[str, typer.Option("--normalize", help="none, NFC or NFKC.")] = "NFC",
    mask: Annotated[str, typer.Option("--mask", metavar="A,B", help="Of email, phone, key.")] = "",
    characters_min: Annotated[int, typer.Option("--min-chars")] = 1,
    characters_max: Annotated[int | None, typer.Option("--max-chars")] = None,
    format: FormatOption = "auto",
    rows: Annotated[
        bool, typer.Option("--rows", help="Write OUT.dropped.jsonl: each dropped row and why.")
    ] = False,
    overwrite: OverwriteOption = False,
    sets: SetOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Write a cleaned copy, and tell what was dropped and why.

    --set takes the other keys of [data.clean].
    """
    from llmproto.data import DataClean
    from llmproto.recipes import CleanOptions

    from libllm.recipes import convert

    document = {
        "duplicates": duplicates,
        "normalize": normalize,
        "mask": [part.strip() for part in mask.split(",") if part.strip()],
        "characters_min": characters_min,
        "characters_max": characters_max,
        **sets_of(sets),
    }
    message = DataClean(
        inputs=_absolute(inputs),
        output=os.path.abspath(output),
        clean=convert(document, CleanOptions, "clean"),
        data=_reading(format),
        overwrite=overwrite,
        rows=rows,
    )
    with operating(context, home) as operator:
        _show(operator.data(message), json=json)


@app.command()
def augment(
    context: typer.Context,
    inputs: Inputs,
    output: OutputOption,
    copies: Annotated[int, typer.Option("--copies", help="New rows for each row.")] = 1,
    delete: Annotated[float, typer.Option("--delete", help="Share of words deleted.")] = 0.0,
    swap: Annotated[float, typer.Option("--swap", help="Share of words swapped.")] = 0.0,
    insert: Annotated[float, typer.Option("--insert", help="Share of synonyms added.")] = 0.0,
    replace: Annotated[
        float, typer.Option("--replace", help="Share of words replaced by synonyms.")
    ] = 0.0,
    synonyms: Annotated[
        str | None, typer.Option("--synonyms", metavar="FILE", help="word: synonym, synonym")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    format: FormatOption = "auto",
    overwrite: OverwriteOption = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Write the rows and changed copies of them."""
    from llmproto.data import DataAugment
    from llmproto.recipes import AugmentOptions

    from libllm.recipes import convert

    document = {
        "copies": copies,
        "delete": delete,
        "swap": swap,
        "insert": insert,
        "replace": replace,
        "synonyms": None if synonyms is None else os.path.abspath(synonyms),
        "seed": seed,
    }
    message = DataAugment(
        inputs=_absolute(inputs),
        output=os.path.abspath(output),
        augment=convert(document, AugmentOptions, "augment"),
        data=_reading(format),
        overwrite=overwrite,
    )
    with operating(context, home) as operator:
        _show(operator.data(message), json=json)


@app.command()
def inspect(
    context: typer.Context,
    inputs: Inputs,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Count tokens with this model's."),
    ] = None,
    format: FormatOption = "auto",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Tell what is in data files."""
    from llmproto.data import DataInspect

    message = DataInspect(
        inputs=_absolute(inputs),
        data=_reading(format),
        tokenizer=None if tokenizer is None else os.path.abspath(tokenizer),
    )
    with operating(context, home) as operator:
        _show(operator.data(message), json=json)


def _absolute(paths: list[str]) -> list[str]:
    return [os.path.abspath(os.path.expanduser(path)) for path in paths]


def _reading(format: str) -> "DataRecipe | None":
    from llmproto.recipes import DataRecipe

    from libllm.recipes import convert

    return None if format == "auto" else convert({"format": format}, DataRecipe, "the flags")


def _show(report: "DataReport", *, json: bool) -> None:
    from libllm.cli import tables

    if json:
        print_json(report)
        return
    for line in tables.data_report(report):
        print(line)
    if report.columns:
        console().print(tables.columns(report.columns))
