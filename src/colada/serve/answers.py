"""From a request's fields to what a session is asked for, and from its chunks to what the client is sent."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colada.errors import ColadaError
from colada.serve.admission import Limits, Refusal, invalid
from colada.serve.driver import Choice, News, Ticket, as_refusal
from colada.serve.models import Served
from colada.serve.protocol import (
    LONGEST_STOP,
    MOST_CHOICES,
    MOST_PROMPTS,
    MOST_STOPS,
    ChatRequest,
    Common,
    CompletionRequest,
    Extension,
    unknown_field,
)

if TYPE_CHECKING:
    from colada.text.transcript import Chunk, Completion

REASONS = {"length": "length", "end": "stop", "stop": "stop"}
EXACT_SEED = 2**53
"""Seeds that are drawn are below it: JavaScript reads them exactly."""
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_EXTENSION = ("steps", "guidance", "guidance_interval", "solver", "schedule", "noise", "end_ids")


@dataclass(frozen=True)
class Job:
    """A request, checked: what its choices ask of a session, and what its answer needs.

    Attributes:
        prompts: their ids.
        echoes: what stands before each prompt's first text.
        ticket: its choices; choice i of prompt p has number p n + i.
        latents: that each choice takes.
        settings: of the choices, as used, but for their seeds.
        ignored: unknown fields that were left out.
    """

    body: Common
    served: Served
    prompts: Sequence[Sequence[int]]
    echoes: Sequence[str]
    ticket: Ticket
    latents: list[int]
    settings: dict[str, Any]
    ignored: Sequence[str]

    @property
    def extension(self) -> Extension:
        """The object ``colada``."""
        return self.body.colada or Extension()


def open_job(body: Common, served: Served, limits: Limits, lenient: bool) -> Job:
    """Check a request, and tokenise its prompts.

    Raises:
        Refusal: naming the field at fault.
    """
    ignored = sorted(body.model_extra or {})
    if ignored and not lenient:
        raise unknown_field(ignored[0])
    new = _check_fields(body, served, limits)
    try:
        texts = _prompts(body, served)
        prompts = [served.model.ids(text) for text in texts]
        settings = _settings(body, served)
        chosen = served.model.chosen(settings)
        served.model.endings(chosen)
    except ColadaError as error:
        raise _field_of(as_refusal(error)) from None
    count = body.n or 1
    suffix = served.model.ids(body.suffix) if isinstance(body, CompletionRequest) and body.suffix else None
    if len(prompts) * count > MOST_CHOICES:
        raise invalid("n", count, f"{len(prompts)} prompts times n to be at most {MOST_CHOICES}")
    choices, latents = [], []
    seed = _seed(body, chosen)
    for ids in prompts:
        most = served.most_new(len(ids) + len(suffix or ()), limits)
        wanted = new if new is not None else max(1, min(body.default_tokens, most))
        if wanted > most:
            raise _too_long(len(ids) + len(suffix or ()), wanted, served, limits)
        for number in range(count):
            choices.append(Choice(ids, wanted, {**settings, "seed": seed + number}, suffix))
            latents.append(served.latents(len(ids) + len(suffix or ()), wanted))
    extension = body.colada or Extension()
    watching = bool(extension.guesses) and served.model.arch == "cola"
    ticket = Ticket(served.name, choices, watching, watching or bool(extension.confidence), extension.latents)
    echoed = isinstance(body, CompletionRequest) and body.echo
    echoes = [_echo(text, served) if echoed else "" for text in texts]
    return Job(body, served, prompts, echoes, ticket, latents, chosen, ignored)


def _check_fields(body: Common, served: Served, limits: Limits) -> int | None:
    """Check what fields may be together; return how many tokens are wanted, if that is said."""
    extension = body.colada or Extension()
    new, also = body.max_tokens, body.max_completion_tokens
    if new is not None and also is not None and new != also:
        raise invalid("max_completion_tokens", also, f"the same as max_tokens={new}, or one of them")
    new = also if new is None else new
    if new is not None and new > limits.max_tokens:
        raise invalid("max_tokens", new, f"at most {limits.max_tokens}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", body.stream_options.model_dump(), "stream: true beside it")
    if extension.guesses and not body.stream:
        raise invalid("colada.guesses", True, "stream: true beside it")
    if extension.latents and not extension.guesses:
        raise invalid("colada.latents", extension.latents, "colada.guesses: true beside it")
    if extension.steps is not None and extension.steps > limits.max_steps:
        raise invalid("colada.steps", extension.steps, f"at most {limits.max_steps}")
    if body.top_k is not None and body.top_k > served.model.vocab_size:
        raise invalid("top_k", body.top_k, f"at most the vocabulary's {served.model.vocab_size}")
    if extension.end_ids and body.ignore_eos:
        raise invalid("ignore_eos", True, "no colada.end_ids beside it")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS or any(not 1 <= len(stop) <= LONGEST_STOP for stop in stops):
        raise invalid("stop", body.stop, f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
    if isinstance(body, CompletionRequest):
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise Refusal(
                400, "unsupported_parameter", f"best_of={body.best_of}, expected as many as n", "best_of"
            )
        if body.suffix and served.model.arch != "cola":
            text = f"suffix: {served.name} cannot fill a hole, expected none"
            raise Refusal(400, "unsupported_parameter", text, "suffix")
        if body.suffix and stops:
            raise invalid("stop", body.stop, "none where a suffix asks for a hole of max_tokens tokens")
    return new


def _prompts(body: Common, served: Served) -> list[str | list[int]]:
    if isinstance(body, ChatRequest):
        if served.model.chat_template is None or served.model.tokenizer is None:
            text = f"{served.name} has no chat template: use /v1/completions"
            raise Refusal(400, "no_chat_template", text, "messages")
        return [served.model.chat_prompt([message.plain() for message in body.messages])]
    assert isinstance(body, CompletionRequest)
    prompt: Any = "" if body.prompt is None else body.prompt
    several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    prompts: list[str | list[int]] = prompt if several else [prompt]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise Refusal(400, "invalid_value", f"{len(prompts)} prompts, expected 1 to {MOST_PROMPTS}", "prompt")
    return [[] if prompt == "" else prompt for prompt in prompts]


def _settings(body: Common, served: Served) -> dict[str, Any]:
    """Return the settings that are said, under the names of :class:`colada.generate.settings.Settings`."""
    settings = {name: getattr(body, name) for name in _SAMPLING if getattr(body, name) is not None}
    if body.top_k == -1:
        settings["top_k"] = 0
    if body.stop:
        settings["stop"] = body.stop
    if body.ignore_eos:
        settings["end_ids"] = ()
    extension = body.colada or Extension()
    settings |= {
        name: getattr(extension, name) for name in _EXTENSION if getattr(extension, name) is not None
    }
    return served.model.check(settings)


def _seed(body: Common, chosen: dict[str, Any]) -> int:
    if body.seed is None:
        return 0 if chosen["temperature"] == 0 else secrets.randbelow(EXACT_SEED)
    if body.seed + (body.n or 1) > 2**63:
        raise invalid("seed", body.seed, "the last choice's seed below 2**63")
    return body.seed


def _field_of(refusal: Refusal) -> Refusal:
    """Name the field of a setting as it is in a request."""
    if refusal.detail.startswith("prompt of "):
        refusal.param, refusal.code = "prompt", "context_length_exceeded"
    elif refusal.param in _EXTENSION:
        refusal.param = f"colada.{refusal.param}"
    elif refusal.param not in (*_SAMPLING, "stop"):
        refusal.param = {
            "prompt": "prompt",
            "text": "prompt",
            "chat:": "messages",
            "end_ids:": "colada.end_ids",
        }.get(refusal.detail.partition(" ")[0])
    return refusal


def _too_long(prompt: int, new: int, served: Served, limits: Limits) -> Refusal:
    most = served.context(limits)
    text = f"a prompt of {prompt} tokens and {new} new ones, expected at most {most} together"
    return Refusal(400, "context_length_exceeded", text, "prompt" if prompt >= most else "max_tokens")


def _echo(text: str | list[int], served: Served) -> str:
    if isinstance(text, str):
        return text
    return "" if served.model.tokenizer is None else served.model.tokenizer.decode(text, skip_special=False)


@dataclass
class _Written:
    """What is written of a choice so far."""

    blocks: int = 0
    confidence: list[float] = field(default_factory=list)
    completion: Completion | None = None


class Writer:
    """Makes of a job's chunks the events of its stream, or its one answer."""

    def __init__(self, job: Job) -> None:
        self.job, self.chat = job, isinstance(job.body, ChatRequest)
        self._written = [_Written() for _ in job.ticket.choices]
        self._usage_wanted = bool(job.body.stream_options and job.body.stream_options.include_usage)
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": job.served.name,
            "system_fingerprint": job.served.fingerprint,
        }
        if self.chat and job.body.stream:
            self._head["object"] = "chat.completion.chunk"

    def add(self, news: News) -> None:
        """Take what a choice grows by."""
        chunk, written = news.chunk, self._written[news.number]
        if chunk.step is not None:
            return
        written.blocks += 1
        written.confidence += chunk.confidence or ()
        written.completion = chunk.completion

    @property
    def reasons(self) -> list[str]:
        """Why the choices ended."""
        return [one.completion.finish_reason for one in self._written if one.completion is not None]

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, each prompt's once."""
        prompt = sum(map(len, self.job.prompts))
        new = sum(len(one.completion.tokens) for one in self._written if one.completion is not None)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def answer(self) -> dict[str, Any]:
        """Return the whole answer, once all choices are finished."""
        choices = []
        for number, written in enumerate(self._written):
            assert written.completion is not None
            text = self._echo(number) + written.completion.text
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            content = message if self.chat else {"text": text}
            reason = written.completion.finish_reason
            choices.append(self._choice(number, content, reason) | {"colada": self._details(number)})
        return {**self._head, "choices": choices, "usage": self.usage}

    # --- a stream's events -------------------------------------------------------------------

    def begin(self) -> Iterator[str]:
        """Yield what comes before the first text."""
        for number in range(len(self._written)):
            if self.chat:
                yield self._event([self._choice(number, {"delta": {"role": "assistant", "content": ""}})])
            elif echo := self._echo(number):
                yield self._event([self._choice(number, {"text": echo})])

    def events(self, news: News) -> Iterator[str]:
        """Yield what a choice grows by, once :meth:`add` has taken it."""
        number, chunk = news.number, news.chunk
        if chunk.step is not None:
            yield self._event([], colada=self._guess(news))
            return
        watched = self._block(number, chunk) if self.job.ticket.guesses else None
        if chunk.text or watched is not None:
            grown = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
            yield self._event([self._choice(number, grown)], colada=watched)
        if chunk.finish_reason is not None:
            nothing = {"delta": dict[str, str]()} if self.chat else {"text": ""}
            last = self._choice(number, nothing, chunk.finish_reason)
            yield self._event([last | {"colada": self._details(number)}])

    def end(self) -> Iterator[str]:
        """Yield what follows the last choice."""
        if self._usage_wanted:
            yield self._event([], usage=self.usage)
        yield "[DONE]"

    def _event(self, choices: Sequence[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if self._usage_wanted else {}
        extra = {name: value for name, value in more.items() if value is not None}
        return as_json({**self._head, "choices": choices, **usage, **extra})

    @staticmethod
    def _choice(number: int, content: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        finish = None if reason is None else REASONS[reason]
        return {"index": number, **content, "logprobs": None, "finish_reason": finish}

    def _echo(self, number: int) -> str:
        return self.job.echoes[number // (self.job.body.n or 1)]

    def _details(self, number: int) -> dict[str, Any]:
        written, extension = self._written[number], self.job.extension
        assert written.completion is not None
        done = written.completion
        details = {
            "seed": done.seed,
            "settings": {**self.job.settings, "seed": done.seed},
            "blocks": written.blocks,
            "finish": done.finish_reason,
        }
        if extension.tokens:
            details["tokens"] = list(done.tokens)
        if extension.confidence:
            details["confidence"] = _rounded(written.confidence[: len(done.tokens)])
        return details

    # --- a block in focus --------------------------------------------------------------------

    def _guess(self, news: News) -> dict[str, Any]:
        chunk = news.chunk
        assert chunk.step is not None
        assert chunk.steps is not None
        return {
            "type": "guess",
            "index": news.number,
            "block": chunk.block,
            "step": chunk.step,
            "steps": chunk.steps,
            "a": round(self._grid(chunk.steps)[chunk.step], 4),
            "text": chunk.text,
            "tokens": self._spelled(chunk),
            "latents": news.picture,
        }

    def _block(self, number: int, chunk: Chunk) -> dict[str, Any]:
        return {
            "type": "block",
            "index": number,
            "block": chunk.block,
            "text": chunk.text,
            "tokens": self._spelled(chunk),
        }

    def _grid(self, steps: int) -> list[float]:
        from colada.flow import SCHEDULES

        grid: list[float] = SCHEDULES[self.job.settings["schedule"]](steps).tolist()
        return grid

    def _spelled(self, chunk: Chunk) -> list[tuple[int, str, float]]:
        """Return each token with what it adds to the chunk's text, and the decoder's probability of it."""
        tokenizer = self.job.served.model.tokenizer
        texts, before = [], ""
        for count in range(1, len(chunk.tokens) + 1):
            text = "" if tokenizer is None else tokenizer.decode(chunk.tokens[:count]).rstrip("\ufffd")
            texts.append(text[len(before) :] if text.startswith(before) else "")
            before = text if len(text) > len(before) else before
        joined = "".join(texts)
        if texts and chunk.text != joined and chunk.text.endswith(joined):  # A space that decoders strip.
            texts[0] = chunk.text[: len(chunk.text) - len(joined)] + texts[0]
        confidence = _rounded(chunk.confidence or [0.0] * len(texts))
        return list(zip(chunk.tokens, texts, confidence, strict=True))


def _rounded(confidence: Sequence[float]) -> list[float]:
    return [round(float(one), 4) for one in confidence]


def as_json(value: Any) -> str:
    """Return a value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
