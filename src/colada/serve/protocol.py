"""What clients send, strictly: OpenAI's fields and an object ``colada`` beside them, and what is answered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from colada.checks import MOST_SEED
from colada.errors import nearest, shown
from colada.serve.admission import Refusal, invalid

_PROBABILITY = (
    ": the decoder's p(token given latent), which `colada.confidence` gives, is not the model's p(token given"
    " text); `colada eval harness` gives log-likelihoods"
)
NEUTRAL: dict[str, tuple[Sequence[Any], str]] = {
    "frequency_penalty": ([0], ": use repetition_penalty"),
    "presence_penalty": ([0], ": use repetition_penalty"),
    "logprobs": ([False], _PROBABILITY),
    "top_logprobs": ([], _PROBABILITY),
    "logit_bias": ([{}], ""),
    "min_p": ([0], ""),
    "min_tokens": ([0], ""),
    "priority": ([0], ""),
    "store": ([False], ""),
    "service_tier": (["auto", "default"], ""),
    "skip_special_tokens": ([True], ""),
    "include_stop_str_in_output": ([False], ""),
    "response_format": ([{"type": "text"}], ""),
    "tools": ([[]], ""),
    "functions": ([[]], ""),
    "tool_choice": (["none"], ""),
    "function_call": (["none"], ""),
    "parallel_tool_calls": ([True, False], ""),
}
"""Fields that cannot be honoured, with the values that ask for nothing, and why or what to use."""
UNUSED = ("user", "metadata", "prompt_cache_key", "safety_identifier", "add_special_tokens", "request_id")


class Strict(BaseModel):
    """Types as they are in JSON, no further fields; null is as if left out."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Extension(Strict):
    """What Colada's models take beyond OpenAI's fields."""

    steps: int | None = Field(None, ge=1, description="Solver steps a block.")
    guidance: float | None = Field(None, ge=-20, le=100, description="Scale of guidance; 1 is off.")
    guidance_interval: list[float] | None = Field(None, min_length=2, max_length=2)
    guidance_against: str | None = Field(None, description="block or latents: what guidance leads away from.")
    guidance_cap: float | None = Field(None, ge=0, description="Most size of a guided guess; 0 is off.")
    guidance_rescale: float | None = Field(None, ge=0, le=1)
    early_end: float | None = Field(None, ge=0, lt=1)
    candidates: int | None = Field(
        None, ge=1, le=16, description="Draws of every block; the decoder's surest is kept."
    )
    whole_sentences: bool | None = Field(
        None, description="Cut a text that comes to its length after its last whole sentence."
    )
    solver: str | None = None
    schedule: str | list[float] | None = Field(None, description="A name, or a = t / T from 1 to 0.")
    noise: str | None = None
    end_ids: list[int] | None = Field(None, max_length=1024)
    confidence: bool | None = Field(None, description="Answer p(token given latent) of each token.")
    guesses: bool | None = Field(None, description="Stream how a block would read after every solver step.")
    latents: Literal["pca", "full"] | None = Field(None, description="With the guesses, their latents.")
    tokens: bool | None = Field(None, description="Answer the tokens' ids.")


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool | None = None


class Common(BaseModel):
    """What completions and chat have in common; further fields are those of ``NEUTRAL`` and ``UNUSED``."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0.001, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    colada: Extension = Field(default_factory=Extension)

    default_tokens: ClassVar[int]

    def ignored(self, lenient: bool) -> list[str]:
        """Return unknown fields, where lenient. Raises Refusal for those, or those that ask for something."""
        unknown = []
        for name, value in (self.model_extra or {}).items():
            values, why = NEUTRAL.get(name, ((), ""))
            if value is None or name in UNUSED or any(_same(value, one) for one in values):
                continue
            if name in NEUTRAL:
                expected = " or ".join(json.dumps(one) for one in (*values, None))
                raise invalid(name, value, expected + why, "unsupported_parameter")
            if not lenient:
                raise unknown_field(name)
            unknown.append(name)
        return unknown


class CompletionRequest(Common):
    """A prompt to be continued, or with ``suffix`` a hole to be filled."""

    default_tokens = 16

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = Field(None, description="Only as many as n.")


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it with its parts joined."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(Common):
    """A conversation to be answered."""

    default_tokens = 256

    messages: list[Message] = Field(min_length=1, max_length=256)


class TokenizeRequest(Strict):
    """A text to be tokenised."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeRequest(Strict):
    """Tokens to be spelled."""

    model: str | None = None
    tokens: list[int]


class EncodeRequest(Strict):
    """A text whose latents are wanted, as float32 in base64 or as numbers."""

    model: str | None = None
    input: str
    encoding_format: Literal["base64", "float"] | None = None


class DecodeRequest(Strict):
    """Latents to be spelled: rows of numbers, or float32 in base64."""

    model: str | None = None
    latents: str | list[list[float]]


_Usage = create_model("Usage", prompt_tokens=int, completion_tokens=int, total_tokens=int)
_Details = create_model("Details", seed=int, settings=dict[str, Any], blocks=int, finish=str)
_CHOICE: dict[str, Any] = {"index": int, "finish_reason": Literal["stop", "length"], "colada": _Details}
_HEAD: dict[str, Any] = {"id": str, "object": str, "created": int, "model": str, "system_fingerprint": str}
_Text = create_model("TextChoice", text=str, **_CHOICE)
_Said = create_model("Said", role=Literal["assistant"], content=str)
_Chat = create_model("ChatChoice", message=_Said, **_CHOICE)
CompletionAnswer = create_model("CompletionAnswer", choices=list[_Text], usage=_Usage, **_HEAD)  # type: ignore[valid-type]
ChatAnswer = create_model("ChatAnswer", choices=list[_Chat], usage=_Usage, **_HEAD)  # type: ignore[valid-type]
ModelCard = create_model("ModelCard", id=str, object=str, created=int, owned_by=str, colada=dict[str, Any])
ModelList = create_model("ModelList", object=str, data=list[ModelCard])  # type: ignore[valid-type]
Tokens = create_model("Tokens", tokens=list[int], count=int, max_model_len=int)
Spelled = create_model("Spelled", prompt=str)
Latents = create_model("Latents", latents=str | list[list[float]], shape=list[int])
Decoded = create_model("Decoded", text=str, tokens=list[int])
Health = create_model("Health", status=str)
_Error = create_model("Error", message=str, type=str, param=str | None, code=str)
ErrorAnswer = create_model("ErrorAnswer", error=_Error)


# --- what is refused -----------------------------------------------------------------------------


def read_json(body: bytes) -> dict[str, Any]:
    """Return what a body says. Raises Refusal for what is no JSON object of text and finite numbers."""
    if not body:
        raise Refusal(400, "missing_parameter", "the body is missing, expected a JSON object")

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{shown(text)}, expected a finite number")
        return value

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is there twice")
        return values

    try:
        value = json.loads(
            body.decode(), parse_constant=number, parse_float=number, object_pairs_hook=members
        )
        if re.search(rb"\\u[dD][89a-fA-F]", body):
            json.dumps(value, ensure_ascii=False).encode()  # Half a surrogate pair is no text.
    except RecursionError:
        raise Refusal(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError as error:  # Also what is no UTF-8, and numbers of too many digits.
        raise Refusal(400, "invalid_json", f"the body is no JSON: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", f"the body is {shown(value)}, expected a JSON object")
    return {name: member for name, member in value.items() if member is not None}


def field_refused(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """Return the refusal of what pydantic says of a request's fields: of the first one."""
    first, name = errors[0], _field_name(errors[0]["loc"])
    if first["type"] == "missing":
        return Refusal(400, "missing_parameter", f"{name} is missing, expected it", name)
    if first["type"] == "extra_forbidden":
        return unknown_field(name)
    # A field of several types has an error for each.
    messages = dict.fromkeys(error["msg"] for error in errors if _field_name(error["loc"]) == name)
    expected = " or ".join(text.removeprefix("Input should be ") for text in messages)
    return invalid(name, first["input"], expected)


def _field_name(place: Sequence[str | int]) -> str:
    parts = [str(part) for part in place]
    while len(parts) > 1 and re.search(r"[^a-z_0-9]|^(str|int|float|bool|list|tagged)$", parts[-1]):
        parts.pop()  # Which of a field's types.
    return ".".join(parts)


def unknown_field(name: str) -> Refusal:
    """Return the refusal of a field that there is not."""
    names = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *Extension.model_fields, *NEUTRAL]
    leaf = name.rpartition(".")[2]
    hint = nearest(leaf, [known for known in names if known != leaf])
    return Refusal(400, "unknown_parameter", f"unknown field {shown(name)}{hint}", name)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
