"""The command `run`: one answer, streamed, or a chat at the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from libllm.cli.options import BOOT_S, HomeOption, JsonOption, system_of
from libllm.cli.output import print_json, say

if TYPE_CHECKING:
    from llmproto.models import ModelRow

    from libllm.cli.system import Operator, Streaming
    from libllm.options import Options


def run(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A name of `llmos models`, a folder, or ORG/NAME on the hub."
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]", help="Else standard input; at a terminal an interactive chat."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Else until the context is full.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: always the most likely token.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Of the k most likely; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Least part of the best one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    presence_penalty: Annotated[float, typer.Option("--presence-penalty")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Else drawn at random.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's own end.")
    ] = False,
    system_text: Annotated[
        str | None, typer.Option("--system", help="System message of a chat.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="PROMPT is a message to answer, or text to continue. Default: text, but in an "
            "interactive chat with a model that has a chat template.",
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell tokens and speed on standard error.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Generate text, or chat; boots if nothing is up.

    Standard output gets the text as it comes and nothing else; the prompt is not
    repeated. Ctrl-C ends the generation.
    """
    from libllm.cli import lookup
    from libllm.cli.chat import converse

    if system_text is not None and chat is False:
        raise typer.BadParameter("--system makes sense with --chat, not with --raw")
    interactive = prompt is None and sys.stdin.isatty() and not json
    if prompt is None and not interactive:
        prompt = _standard_input()
    system = system_of(context)
    place = system.home(home)
    if not system.is_running(place):
        say(f"llmos: booting in {place.root}; it stays until `llmos down`")
        system.boot(place, timeout_s=BOOT_S)
    with system.connect(place) as operator:
        progress = sys.stderr.isatty() and not json
        row = lookup.model_of(system, operator, model, progress=progress)
        options: Options = {
            "model": row.model.name,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
            "stop": stop or [],
            "ignore_eos": ignore_eos,
            "service_class": 0 if interactive else 1,
        }
        if prompt is None:
            as_chat = row.model.chat if chat is None else chat
            converse(system, operator, options, system_text, chat=as_chat)
            return
        as_chat = bool(chat) or system_text is not None
        turns = turns_of(prompt, system_text) if as_chat else None
        if json:
            _print_document(operator, prompt, turns, options, row)
            return
        pieces = start(operator, prompt, turns, options)
        write(pieces, verbose=verbose)


def _standard_input() -> str:
    """All of it, less the newline that ends a file; INVALID where it is not text."""
    from llmproto.errors import invalid

    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise invalid(f"standard input is not UTF-8 text: {error}") from None


def turns_of(prompt: str, system_text: str | None) -> list[dict[str, str]]:
    """A chat of one message."""
    first = [] if system_text is None else [{"role": "system", "content": system_text}]
    return [*first, {"role": "user", "content": prompt}]


def start(
    operator: "Operator", prompt: str, turns: list[dict[str, str]] | None, options: "Options"
) -> "Streaming":
    """Ask for the pieces: of a chat where there are turns, else of a continuation."""
    if turns is None:
        return operator.generate(prompt, stream=True, **options)
    return operator.chat(turns, stream=True, **options)


def write(pieces: "Streaming", *, verbose: bool = False) -> str:
    """Print the pieces as they come and give the whole text; interrupted, the thread is
    cancelled."""
    import time

    began_s = time.monotonic()
    first_s: float | None = None
    texts: list[str] = []
    last = None
    try:
        for piece in pieces:
            if first_s is None:
                first_s = time.monotonic()
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            texts.append(piece.text)
            last = piece
    finally:
        pieces.close()
        if texts and sys.stdout.isatty() and not texts[-1].endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    if verbose and last is not None and last.usage is not None and first_s is not None:
        took_s = max(time.monotonic() - first_s, 1e-9)
        say(
            f"{last.usage.prompt_tokens} prompt tokens, {last.usage.output_tokens} new "
            f"({last.finish_reason}); first after {(first_s - began_s) * 1000:.0f} ms, "
            f"then {max(0, last.usage.output_tokens - 1) / took_s:.1f} tokens/s"
        )
    return "".join(texts)


def _print_document(
    operator: "Operator",
    prompt: str,
    turns: list[dict[str, str]] | None,
    options: "Options",
    row: "ModelRow",
) -> None:
    pieces = start(operator, prompt, turns, {**options, "logprobs": 0})  # 0: for the ids
    texts: list[str] = []
    tokens: list[int] = []
    last = None
    try:
        for last in pieces:
            texts.append(last.text)
            tokens += [score.token for score in last.scores or ()]
    finally:
        pieces.close()
    print_json(
        {
            "model": row.model.name,
            "text": "".join(texts),
            "tokens": tokens,
            "finish_reason": None if last is None else last.finish_reason,
            "stop": None if last is None else last.stop,
            "usage": None if last is None else last.usage,
            "stream": None if last is None else last.stream,
        }
    )
