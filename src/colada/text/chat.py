"""Conversations and prompts with completions, as samples: a prompt that is read, an answer that is learnt.

A chat template is a Jinja text as model hubs keep it, rendered with ``messages`` and
``add_generation_prompt``. The prompt of an answer is the rendering of all messages before it with
``add_generation_prompt``; the answer is what the template then adds for it, up to and with the first
end token. Both are tokenised by themselves, as in generation, where only the prompt exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from colada.checks import require_choice
from colada.errors import ColadaError, failure, shown
from colada.files import read_text
from colada.text.tokenizer import IM_END, IM_START, Tokenizer

ANSWERING = "assistant"  # The role whose turns are learnt.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    f"{IM_START}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{IM_END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{IM_START}assistant\n{{% endif %}}"
)
"""ChatML."""
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    f"{{{{ eos_token if message['role'] == '{ANSWERING}' else '' }}}}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ANSWERING.capitalize()}:\n{{% endif %}}"
)
"""Roles as words, and end-of-text after answers: for models that were pretrained on text alone."""
_MOST_TEMPLATE = 2**20  # Bytes; the longest known have a tenth of it.
# Python's own compiler, which reads what Jinja makes of a template, has limits of its own.
_TEMPLATE_ERRORS = (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError)
ROLES = ("system", "developer", "user", ANSWERING, "tool")


def read_template(path: Path) -> str:
    """Return a chat template's text.

    Raises:
        ColadaError: if the file cannot be read or is no Jinja template.
    """
    template = read_text(path, "a chat template", _MOST_TEMPLATE)
    try:
        _environment().from_string(template)
    except _TEMPLATE_ERRORS as error:
        deep = isinstance(error, MemoryError)  # Of Python's compiler.
        raise failure(f"{path} is not a chat template", RecursionError() if deep else error) from None
    return template


def render(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, template: str, origin: str, answer: bool
) -> str:
    """Return a conversation as text.

    Args:
        answer: end where the next answer begins.
        origin: names the conversation in errors.

    Raises:
        ColadaError: if the template refuses it.
    """
    try:
        return _compiled(template).render(
            messages=messages,
            add_generation_prompt=answer,
            eos_token=tokenizer.decode([tokenizer.eos_id], skip_special=False),
            pad_token=tokenizer.decode([tokenizer.pad_id], skip_special=False),
            bos_token="",
        )
    except Exception as error:  # A template is a program: it fails with whatever its expressions raise.
        raise failure(f"{origin}: the chat template refuses it", error) from None


def check_messages(messages: object, tokenizer: Tokenizer, origin: str) -> list[dict[str, str]]:
    """Return a conversation once checked.

    Raises:
        ColadaError: if it is no list of objects with a known ``role`` and string ``content``, or a content
            spells a special token, which would end or fake a turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ColadaError(f"{origin}: messages is {shown(messages)}, expected a list of role and content")
    for number, message in enumerate(messages):
        where = f"{origin}: messages[{number}]"
        if not isinstance(message, Mapping):
            raise ColadaError(f"{where} is {shown(message)}, expected an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ColadaError(f"{where}.{key} is {shown(message.get(key))}, expected a string")
            for token in tokenizer.specials:
                if token in message[key]:
                    raise ColadaError(
                        f"{where}.{key} spells the special token {token!r}, expected plain text"
                    )
        require_choice(f"{where}.role", message["role"], ROLES)
    return messages


def encode_messages(
    messages: object, tokenizer: Tokenizer, template: str, origin: str
) -> list[tuple[list[int], int]]:
    """Return a sample for each assistant turn: its ids with the prompt before, and the prompt's length.

    Raises:
        ColadaError: naming ``origin``, for a malformed conversation, one without an assistant's turn, or
            a template whose rendering of a conversation does not begin with that of its prompt.
    """
    turns = check_messages(messages, tokenizer, origin)
    samples = []
    for number, message in enumerate(turns):
        if message["role"] != ANSWERING:
            continue
        if not message["content"].strip():
            raise ColadaError(f"{origin}: messages[{number}].content is empty, expected an answer to learn")
        prompt = render(turns[:number], tokenizer, template, origin, answer=True)
        whole = render(turns[: number + 1], tokenizer, template, origin, answer=False)
        if not whole.startswith(prompt):
            raise ColadaError(
                f"{origin}: the chat template renders messages[{number}] in another way than its prompt"
            )
        if not whole[len(prompt) :].strip():
            raise ColadaError(f"{origin}: the chat template adds nothing for the answer messages[{number}]")
        ids = _encode(prompt, tokenizer, origin)
        answer = _encode(whole[len(prompt) :], tokenizer, origin)
        ends = [at for at, token in enumerate(answer) if token in tokenizer.end_ids]
        answer = (
            answer[: ends[0] + 1] if ends else [*answer, tokenizer.eos_id]
        )  # Not every template has an end.
        samples.append((ids + answer, len(ids)))
    if not samples:
        raise ColadaError(f"{origin}: no message has the role {ANSWERING!r}, expected an answer to learn")
    return samples


def encode_pair(
    prompt: object, completion: object, tokenizer: Tokenizer, origin: str
) -> tuple[list[int], int]:
    """Return a prompt with its completion and the end-of-text id, and the prompt's length.

    Raises:
        ColadaError: naming ``origin``, if either is no string, or the completion is empty or spells a token
            that would end it. A prompt may hold special tokens: it may be rendered already.
    """
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise ColadaError(f"{origin}: {name} is {shown(text)}, expected a string")
    if not completion:
        raise ColadaError(f"{origin}: completion is empty, expected text to learn")
    ids, answer = (_encode(str(text), tokenizer, origin) for text in (prompt, completion))
    if set(answer) & set(tokenizer.end_ids):
        raise ColadaError(f"{origin}: completion spells an end token, expected plain text: it gets its own")
    return [*ids, *answer, tokenizer.eos_id], len(ids)


def encode_preference(
    prompt: object, answers: Sequence[object], tokenizer: Tokenizer, template: str | None, origin: str
) -> list[tuple[list[int], int]]:
    """Return a sample for each of several answers to one prompt: its ids, and the prompt's length.

    Args:
        prompt: a text, as :func:`encode_pair` takes it; or a conversation's messages, for which there must be
            a template.

    Raises:
        ColadaError: naming ``origin``, for anything that is neither, or no answer.
    """
    if isinstance(prompt, str):
        return [encode_pair(prompt, answer, tokenizer, origin) for answer in answers]
    if not isinstance(prompt, list):
        raise ColadaError(f"{origin}: prompt is {shown(prompt)}, expected a string or a list of messages")
    if template is None:
        raise ColadaError(f"{origin}: a prompt of messages without a chat template, expected one")
    samples = []
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ColadaError(f"{origin}: answer {shown(answer)}, expected text to learn")
        turns = [*prompt, {"role": ANSWERING, "content": answer}]
        samples.append(encode_messages(turns, tokenizer, template, origin)[-1])
    return samples


def _encode(text: str, tokenizer: Tokenizer, origin: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ColadaError as error:
        raise ColadaError(f"{origin}: {error}") from None


class _Generation(Extension):
    """``{% generation %}``, with which templates mark what is learnt: here the prompt's end says it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no product or power is larger than a conversation."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power; raises TemplateError for a large one."""
        several = (str, list, tuple)
        sizes = [len(value) if isinstance(value, several) else value for value in (left, right)]
        if all(isinstance(size, int | float) for size in sizes):
            one, other = (abs(size) for size in sizes)
            text = isinstance(left, several) or isinstance(right, several)
            large = max(one, other) > 64 if operator == "**" else one * other > (2**20 if text else 2**64)
            if large:
                raise TemplateError(f"what {operator} makes is too large")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Return what templates of model hubs expect to find."""
    # Not optimised: a template's constants would be computed while it is read, whatever their size.
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        optimized=False,
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = partial(
        json.dumps, ensure_ascii=False
    )  # Jinja's own is escaped for HTML.
    return environment


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)
