"""The commands that write text: ``generate`` and ``chat``."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    LinesOption,
    ModelOption,
    QuantiseOption,
    RevisionOption,
    TextArgument,
    check_model_options,
    load_model,
    read_message,
    read_texts,
    settings_options,
)
from colada.errors import ColadaError
from colada.generate.settings import Settings, check_settings
from colada.locate import BUNDLED, BUNDLED_CHAT, CHAT_TEMPLATE_FILE, local

if TYPE_CHECKING:
    from colada.models.base import LanguageModel

TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="How many tokens, unless the text ends before.")
]


@settings_options
def generate(
    prompt: TextArgument = None,
    file: FileOption = None,
    lines: LinesOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    max_new_tokens: TokensOption = 64,
    seed: Annotated[
        int, typer.Option(help="Prompt i, from 0, has seed + i (seed + 1000 i with released noise).")
    ] = 0,
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(help="How many prompts are continued together.")] = 16,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take each text as a user's message, and print the answer alone.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt, each on its line.")
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print a text when it is finished, not as it grows.")
    ] = False,
    **settings: Any,
) -> None:
    """Continue a text, or several.

    On a terminal a single text is shown as it forms: what is finished, and the
    block under way as it would read after each solver step.
    """
    asked_settings = cast(Settings, {**settings, "seed": seed})
    # All that can be refused is, before torch is imported.
    check_settings(asked_settings)
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    require_count("batch", batch)
    check_model_options(model, revision, dtype, device, quantise)
    texts = read_texts(prompt, file, lines)
    if chat:
        model = _chat_model(model, revision)
    network = load_model(model, revision, dtype, device, quantise)
    from colada.text.transcript import in_order

    prompts = texts
    if chat:
        prompts = [network.chat_prompt([{"role": "user", "content": text}]) for text in texts]

    chosen = {**network.chosen(asked_settings), "max_new_tokens": max_new_tokens}
    del chosen["seed"]  # Every prompt has its own.
    if len(prompts) == 1 and not as_json and not no_stream:
        shown = "" if chat else prompts[0]
        _stream(network, prompts[0], shown, max_new_tokens, asked_settings)
        return
    errors: dict[int, str] = {}  # by prompt; the others are finished and printed first
    cut = 0
    chunks = network.stream(prompts, max_new_tokens, batch=batch, **asked_settings)
    for number, done in enumerate(in_order(chunks)):
        if done.error is not None:
            errors[number] = done.error
        cut += done.finish_reason == "length"
        if as_json:
            fields: dict[str, Any] = {"text": done.text, "tokens": done.tokens}
            if done.error is not None:
                fields = {"error": done.error}
            fields["finish_reason"] = done.finish_reason
            line = {"prompt": texts[number], **fields, "seed": done.seed, "settings": chosen}
            print(json.dumps(line), flush=True)
        else:
            shown = "" if chat else prompts[number]
            print("\n" * (number > 0) + shown + done.text, flush=True)
    _say_cut(cut, max_new_tokens)
    if errors:
        which, why = min(errors.items())
        raise ColadaError(f"{len(errors)} of {len(prompts)} prompts failed, first number {which}: {why}")


def _say_cut(texts: int, length: int) -> None:
    """Say on a terminal's standard error how many texts have come to their length: they might go on."""
    if texts and sys.stderr is not None and sys.stderr.isatty():
        which = "" if texts == 1 else f"{texts} texts "
        print(f"{which}stopped at {length} tokens", file=sys.stderr)


def _stream(
    network: LanguageModel,
    prompt: str,
    shown: str,
    max_new_tokens: int,
    settings: Settings,
    written: list[str] | None = None,
) -> None:
    """Print what is shown of one prompt, and its continuation as it grows; on a terminal, with guesses.

    The continuation is added to ``written`` piece by piece, so that it is there after an interrupt too.

    Raises:
        ColadaError: if the sample fails; what was finished before has been printed.
    """
    from rich.console import Console

    from colada.cli.terminal import PROMPT_STYLE, LiveText

    written = [] if written is None else written
    console = Console(highlight=False)
    live = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
    chunks = network.stream(prompt, max_new_tokens, guesses=live, **settings)
    error: str | None = None
    reason: str | None = None
    if not live:
        print(shown, end="", flush=True)
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            written.append(chunk.text)
            error, reason = chunk.error, chunk.finish_reason
        print(flush=True)
        if error is not None:
            raise ColadaError(error)
        _say_cut(reason == "length", max_new_tokens)
        return
    tokens, begin = 0, time.perf_counter()
    with LiveText(console) as view:
        view.write(shown, PROMPT_STYLE)
        for chunk in chunks:
            if chunk.step is None:
                tokens += len(chunk.tokens)
                view.write(chunk.text)
                written.append(chunk.text)
                error, reason = chunk.error, chunk.finish_reason
            else:
                rate = tokens / (time.perf_counter() - begin)
                place = f"block {chunk.block + 1} · step {chunk.step}/{chunk.steps}"
                view.guess(chunk.text, f"{place} · {tokens} tokens ({rate:.0f}/s)")
    if error is not None:
        raise ColadaError(error)
    _say_cut(reason == "length", max_new_tokens)


# --- chat --------------------------------------------------------------------------------------

_CHAT_HELP = "/reset begins anew, /quit or the end of input ends, Ctrl-C cuts an answer short"


def _about(network: LanguageModel) -> str:
    """Return what a person should know who talks to a model."""
    read = network.training_length
    rows = "" if read is None else f" trained on {read} tokens at a time"
    return f"{network.origin}: a language model{rows}; what it says may be wrong, and it knows no news"


def _chat_model(model: str | None, revision: str | None) -> str | None:
    """Return the model that is talked to: one that is named, or the bundled one for chats if it is here.

    Raises:
        ColadaError: if it is on this machine, and was not trained on conversations.
    """
    if model is None and BUNDLED_CHAT.is_dir():
        return "bundled-chat"
    directory = BUNDLED if model is None else local(model, revision)
    if directory is not None and not (directory / CHAT_TEMPLATE_FILE).is_file():
        name = model or "the bundled model"
        raise ColadaError(
            f"{name} has no chat template ({CHAT_TEMPLATE_FILE}), which a model trained on conversations has "
            "(colada train recipes/chat.yaml makes one of the bundled model); colada generate without --chat"
            " continues any text"
        )
    return model


@settings_options
def chat(
    model: ModelOption = None,
    revision: RevisionOption = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message, before the conversation.")
    ] = None,
    max_new_tokens: TokensOption = 256,
    seed: Annotated[int, typer.Option(help="Answer i, from 0, has seed + i.")] = 0,
    dtype: DtypeOption = None,
    quantise: QuantiseOption = None,
    device: DeviceOption = "cpu",
    **settings: Any,
) -> None:
    """Talk to a model that was trained on conversations, turn by turn.

    Each line is a message. /reset begins anew, /quit or the end of input ends, Ctrl-C cuts an answer short.
    """
    check_settings({**settings, "seed": seed})
    require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    check_model_options(model, revision, dtype, device, quantise)
    model = _chat_model(model, revision)
    if sys.stdin is None:
        raise ColadaError("standard input is closed, expected messages")
    network = load_model(model, revision, dtype, device, quantise)
    start = [] if system is None else [{"role": "system", "content": system}]
    network.chat_prompt([*start, {"role": "user", "content": "Hello"}])  # What is refused is, before a line.
    typed = sys.stdin.isatty()
    if typed:
        print(f"{_about(network)}\n{_CHAT_HELP}", file=sys.stderr)
    messages, answers = list(start), 0
    while (line := read_message(typed)) is not None:
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        written: list[str] = []
        try:
            prompt = network.chat_prompt(asked)
            numbered = cast(Settings, {**settings, "seed": seed + answers})
            _stream(network, prompt, "", max_new_tokens, numbered, written)
        except KeyboardInterrupt:
            if not typed:
                raise
        except ColadaError as error:
            if not typed:
                raise
            # The conversation goes on without the turn that failed.
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": "".join(written)}]
        answers += 1
