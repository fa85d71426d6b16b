"""From a request's fields to what a session is asked for, and from its chunks to what the client is sent."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from colada.errors import ColadaError
from colada.serve.admission import EXTENSION, SAMPLING, Limits, Refusal, as_refusal, invalid
from colada.serve.driver import Ticket
from colada.serve.models import Served
from colada.serve.protocol import ChatRequest, Common, CompletionRequest

if TYPE_CHECKING:
    from colada.text.transcript import Chunk, Completion

MOST_CHOICES, MOST_STOPS, LONGEST_STOP = 64, 16, 256
REASONS = {"length": "length", "end": "stop", "stop": "stop"}
_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
EXACT_SEED = 2**53
"""Seeds that are drawn are below it: JavaScript reads them exactly."""


@dataclass(frozen=True)
class Job:
    """A request, checked: what its choices ask of a session, and what its answer needs.

    Attributes:
        prompts: their ids.
        echoes: what stands before each prompt's first text.
        ticket: its choices; choice i of prompt p has number p n + i.
        latents: that each choice takes.
        watching: whether guesses are sent.
        settings: of the choices, as used, but for their seeds.
        ignored: unknown fields that were left out.
    """

    body: Common
    served: Served
    prompts: Sequence[Sequence[int]]
    echoes: Sequence[str]
    ticket: Ticket
    latents: Sequence[int]
    watching: bool
    settings: Mapping[str, Any]
    ignored: Sequence[str]


def open_job(body: Common, served: Served, limits: Limits, lenient: bool) -> Job:
    """Check a request, and tokenise its prompts.

    Raises:
        Refusal: naming the field at fault.
    """
    ignored, model, extension, count = body.ignored(lenient), served.model, body.colada, body.n or 1
    _check(body, served, limits)
    suffix = body.suffix if isinstance(body, CompletionRequest) else None
    try:
        texts = _prompts(body, served)
        prompts = [model.ids(text) for text in texts]
        after = model.ids(suffix) if suffix else None
        settings = _settings(body)  # Each choice's session checks them again, beside its prompt.
        chosen = model.chosen(settings)
    except ColadaError as error:
        raise as_refusal(error) from None
    if len(prompts) * count > MOST_CHOICES:
        raise invalid("n" if count > 1 else "prompt", count, f"prompts times n to be 1 to {MOST_CHOICES}")
    seed = body.seed
    if seed is None:
        seed = 0 if chosen["temperature"] == 0 else secrets.randbelow(EXACT_SEED)
    watching = bool(extension.guesses) and model.arch == "cola"
    asked = {"suffix": after, "guesses": watching, "confidence": watching or bool(extension.confidence)}
    candidates = int(chosen.get("candidates", 1))
    choices, latents = [], []
    for ids in prompts:
        size = len(ids) + len(after or ())
        most = served.most_new(size, limits, candidates)
        new = body.max_tokens or body.max_completion_tokens or max(1, min(body.default_tokens, most))
        if new > most:
            context = served.context(limits, candidates)
            text = f"a prompt of {size} tokens and {new} new ones, expected at most {context} together"
            param = "prompt" if size >= context else "max_tokens"
            raise Refusal(400, "context_length_exceeded", text, param)
        latents += [served.latents(size, new, candidates)] * count
        for number in range(count):
            choices.append({**asked, **settings, "prompt": ids, "max_new_tokens": new, "seed": seed + number})
    ticket = Ticket(served.name, choices, extension.latents)
    decode = model.tokenizer.decode if model.tokenizer is not None else lambda ids, **_: ""
    echoes = [text if isinstance(text, str) else decode(text, skip_special=False) for text in texts]
    if not (isinstance(body, CompletionRequest) and body.echo):
        echoes = [""] * len(texts)
    return Job(body, served, prompts, echoes, ticket, latents, watching, chosen, ignored)


def _check(body: Common, served: Served, limits: Limits) -> None:
    """Raise Refusal for values that the server or the fields beside them do not allow."""
    extension, heat = body.colada, body.temperature or 0
    new, also, most = body.max_tokens, body.max_completion_tokens, served.model.vocab_size
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    long = any(not 1 <= len(stop) <= LONGEST_STOP for stop in stops)
    more = body if isinstance(body, CompletionRequest) else CompletionRequest()
    watched = extension.guesses and not body.stream
    wrong: list[tuple[str, Any, Any, str]] = [
        ("max_completion_tokens", also, new and also and new != also, f"the same as max_tokens={new}"),
        ("max_tokens", new or also, (new or also or 0) > limits.max_tokens, f"at most {limits.max_tokens}"),
        ("temperature", heat, 0 < heat < 0.01, "0, or 0.01 to 100"),
        ("top_k", body.top_k, (body.top_k or 0) > most, f"at most the vocabulary's {most}"),
        ("stop", body.stop, len(stops) > MOST_STOPS or long, f"{MOST_STOPS} strings of 1 to {LONGEST_STOP}"),
        ("stop", body.stop, more.suffix and stops, "none beside a suffix, whose hole is filled to its end"),
        ("seed", body.seed, (body.seed or 0) + (body.n or 1) > 2**63, "the last choice's below 2**63"),
        ("stream_options", True, body.stream_options and not body.stream, "stream: true beside it"),
        ("ignore_eos", True, body.ignore_eos and extension.end_ids, "no colada.end_ids beside it"),
        (
            "colada.steps",
            extension.steps,
            (extension.steps or 0) > limits.max_steps,
            f"at most {limits.max_steps}",
        ),
        (
            "colada.schedule",
            extension.schedule,
            isinstance(extension.schedule, list) and len(extension.schedule) > limits.max_steps + 1,
            f"at most {limits.max_steps} steps",
        ),
        ("colada.guesses", True, watched, "stream: true beside it"),
        (
            "colada.latents",
            extension.latents,
            extension.latents and not extension.guesses,
            "guesses beside it",
        ),
    ]
    for param, value, holds, expected in wrong:
        if holds:
            raise invalid(param, value, expected)
    if more.best_of not in (None, body.n or 1):
        raise invalid("best_of", more.best_of, "as many as n", "unsupported_parameter")
    if more.suffix and served.model.arch != "cola":
        raise invalid("suffix", more.suffix, "none: this model fills no hole", "unsupported_parameter")


def _prompts(body: Common, served: Served) -> list[str | list[int]]:
    if isinstance(body, ChatRequest):
        if served.model.chat_template is None or served.model.tokenizer is None:
            text = f"{served.name} has no chat template: use /v1/completions"
            raise Refusal(400, "no_chat_template", text, "messages")
        return [served.model.chat_prompt([message.plain() for message in body.messages])]
    assert isinstance(body, CompletionRequest)
    prompt: Any = body.prompt or ("" if body.prompt is None or body.prompt == "" else [])
    single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    prompts = [prompt] if single else prompt
    if not prompts:
        raise invalid("prompt", prompt, "at least one")
    return [one or [] for one in prompts]


def _settings(body: Common) -> dict[str, Any]:
    """Return what is said, under the names of :class:`colada.generate.settings.Settings`."""
    settings = {name: getattr(body, name) for name in SAMPLING}
    settings |= {name: getattr(body.colada, name) for name in EXTENSION}
    if body.top_k == -1:
        settings["top_k"] = 0
    if body.ignore_eos:
        settings["end_ids"] = ()
    return {name: value for name, value in settings.items() if value is not None}


class Reply:
    """Makes of a job's chunks the events of its stream, or its one answer."""

    def __init__(self, job: Job) -> None:
        self.job, self.chat, stream = job, isinstance(job.body, ChatRequest), bool(job.body.stream)
        count = len(job.ticket.choices)
        self._blocks, self._confidence = [0] * count, [list[float]() for _ in range(count)]
        self._completions: list[Completion | None] = [None] * count
        self._usage_wanted = bool(job.body.stream_options and job.body.stream_options.include_usage)
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"chat.completion{'.chunk' * stream}" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": job.served.name,
            "system_fingerprint": job.served.fingerprint,
        }
        self._begun = as_json(self._head)[:-1]  # Of every event: written once.

    def add(self, number: int, chunk: Chunk) -> None:
        """Take what a choice grows by."""
        if chunk.step is None:
            self._blocks[number] += 1
            self._confidence[number] += chunk.confidence or ()
            self._completions[number] = chunk.completion

    @property
    def finished(self) -> bool:
        """Whether all choices are."""
        return None not in self._completions

    @property
    def reasons(self) -> list[str]:
        """Why the choices that are finished have ended."""
        return [done.finish_reason for done in self._completions if done is not None]

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, each prompt's once."""
        prompt = sum(map(len, self.job.prompts))
        new = sum(len(done.tokens) for done in self._completions if done is not None)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def answer(self) -> dict[str, Any]:
        """Return the whole answer, once all choices are finished."""
        choices = []
        for number, done in enumerate(self._completions):
            assert done is not None
            text = self._echo(number) + done.text
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._last(number, message if self.chat else {"text": text}))
        return {**self._head, "choices": choices, "usage": self.usage}

    # --- a stream's events -------------------------------------------------------------------

    def begin(self) -> list[str]:
        """Return what comes before the first text."""
        numbers = range(len(self._completions))
        if self.chat:
            first = {"delta": {"role": "assistant", "content": ""}}
            return [self._event([_choice(number, first)]) for number in numbers]
        return [
            self._event([_choice(number, {"text": echo})])
            for number in numbers
            if (echo := self._echo(number))
        ]

    def events(self, number: int, chunk: Chunk) -> Iterator[str]:
        """Yield what a choice grows by, once :meth:`add` has taken it."""
        position = {"index": number, "block": chunk.block, "text": chunk.text}
        if chunk.step is not None:
            place = {
                "step": chunk.step,
                "steps": chunk.steps,
                "a": self._time(chunk),
                "latents": chunk.latents,
            }
            yield self._event([], {"type": "guess", **position, **place, "tokens": self._spelled(chunk)})
            return
        if chunk.text or self.job.watching:
            grown = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
            block = (
                {"type": "block", **position, "tokens": self._spelled(chunk)} if self.job.watching else None
            )
            yield self._event([_choice(number, grown)], block)
        if chunk.finish_reason is not None:
            nothing: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            yield self._event([self._last(number, nothing)])

    def end(self) -> list[str]:
        """Return what follows the last choice."""
        usage = [as_json({**self._head, "choices": [], "usage": self.usage})] if self._usage_wanted else []
        return [*usage, "[DONE]"]

    def _event(self, choices: Sequence[Mapping[str, Any]], told: Mapping[str, Any] | None = None) -> str:
        usage = ',"usage":null' if self._usage_wanted else ""
        extra = "" if told is None else f',"colada":{as_json(told)}'
        return f'{self._begun},"choices":{as_json(choices)}{usage}{extra}}}'

    def _last(self, number: int, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a choice with why it has ended, and what is needed to repeat it."""
        done, extension = self._completions[number], self.job.body.colada
        assert done is not None
        settings = {**self.job.settings, "seed": done.seed}
        details = {"seed": done.seed, "settings": settings, "blocks": self._blocks[number]}
        details["finish"] = done.finish_reason
        if extension.tokens:
            details["tokens"] = done.tokens
        if extension.confidence:
            details["confidence"] = [round(one, 4) for one in self._confidence[number][: len(done.tokens)]]
        return {**_choice(number, content, REASONS[done.finish_reason]), "colada": details}

    def _echo(self, number: int) -> str:
        return self.job.echoes[number // (self.job.body.n or 1)]

    def _time(self, guess: Chunk) -> float:
        """Return the a = t / T that a guess's evaluation has moved the block to."""
        assert guess.step is not None
        return round(self._times[guess.step], 4)

    @cached_property
    def _times(self) -> list[float]:
        from colada.flow import evaluations_of

        solver_settings = {
            name: self.job.settings[name] for name in ("solver", "schedule", "steps", "early_end")
        }
        return [*(evaluation.a for evaluation in evaluations_of(**solver_settings)), 0.0]

    def _spelled(self, chunk: Chunk) -> list[tuple[int, str, float]]:
        """Return each token with what it adds to the chunk's text, and the decoder's probability of it."""
        tokenizer, texts, before = self.job.served.model.tokenizer, list[str](), ""
        for count in range(1, len(chunk.tokens) + 1):
            text = "" if tokenizer is None else tokenizer.decode(chunk.tokens[:count]).rstrip("\ufffd")
            texts.append(text[len(before) :] if text.startswith(before) else "")
            before = max(text, before, key=len)
        if texts and chunk.text.endswith(before):  # Decoders may strip a space, and halves of characters.
            texts[0] = chunk.text[: len(chunk.text) - len(before)] + texts[0]
        confidence = [round(one, 4) for one in chunk.confidence or [0.0] * len(texts)]
        return list(zip(chunk.tokens, texts, confidence, strict=True))


def _choice(number: int, content: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": number, **content, "logprobs": None, "finish_reason": reason}


def as_json(value: Any) -> str:
    """Return a value as JSON on one line."""
    return _ENCODE(value)
