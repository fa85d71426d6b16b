"""What clients send and are sent: OpenAI's fields, strictly, and an object ``colada`` beside them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from colada.checks import MOST_SEED
from colada.errors import nearest, shown
from colada.serve.admission import Refusal

MOST_PROMPTS, MOST_CHOICES, MOST_MESSAGES, MOST_STOPS, LONGEST_STOP = 64, 64, 256, 16, 256
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# --- JSON ----------------------------------------------------------------------------------------


def read_json(body: bytes) -> Any:
    """Return what a body says. Raises Refusal for what is no JSON of text and finite numbers."""

    def refuse(text: str) -> Any:
        raise ValueError(f"{shown(text)}, expected a finite number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in values if names.count(name) > 1)
            raise ValueError(f"the key {shown(twice)} is there twice")
        return values

    try:
        value = json.loads(
            body.decode(), parse_constant=refuse, parse_float=number, object_pairs_hook=members
        )
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refusal(400, "invalid_json", "the body holds half a surrogate pair, expected text") from None
    except RecursionError:
        raise Refusal(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError as error:  # Also what is no UTF-8, and numbers of too many digits.
        raise Refusal(400, "invalid_json", f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "invalid_json", f"the body is {shown(value)}, expected a JSON object")
    return value


# --- fields --------------------------------------------------------------------------------------


def _only(*values: Any, why: str = "") -> AfterValidator:
    """Take a field that cannot be honoured only with values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in values):
            return value
        expected = " or ".join(json.dumps(one) for one in (*values, None))
        text = f"expected {expected}{': ' if why else ''}{why}"
        raise PydanticCustomError("unsupported_parameter", "{text}", {"text": text})

    return AfterValidator(check)


def _zero_or(low: float, high: float) -> AfterValidator:
    def check(value: float | None) -> float | None:
        if value is None or value == 0 or low <= value <= high:
            return value
        raise PydanticCustomError("out_of_range", "{text}", {"text": f"expected 0, or {low} to {high}"})

    return AfterValidator(check)


_PENALTY = "use repetition_penalty"
_PROBABILITY = (
    "the decoder's p(token given latent) is not the model's p(token given text); colada.confidence returns it"
    " under its own name, and `colada eval harness` gives log-likelihoods"
)
Unused = Annotated[Any, Field(description="Accepted, not used.")]


class Strict(BaseModel):
    """Types as they are in JSON, no further fields; null is as if left out."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Extension(Strict):
    """What Colada's models take beyond OpenAI's fields."""

    steps: int | None = Field(None, ge=1, description="Solver steps a block.")
    guidance: float | None = Field(None, ge=-20, le=100, description="Scale of guidance; 1 is off.")
    guidance_interval: list[float] | None = Field(None, min_length=2, max_length=2)
    solver: str | None = None
    schedule: str | None = None
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
    """What completions and chat have in common."""

    # Further fields are looked at later: --lenient lets them pass.
    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"additionalProperties": False}, protected_namespaces=()
    )

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    temperature: Annotated[float | None, _zero_or(0.01, 100)] = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0.001, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    colada: Extension | None = None
    frequency_penalty: Annotated[float | None, _only(0.0, 0, why=_PENALTY)] = None
    presence_penalty: Annotated[float | None, _only(0.0, 0, why=_PENALTY)] = None
    logit_bias: Annotated[dict[str, Any] | None, _only({})] = None
    min_p: Annotated[float | None, _only(0.0, 0)] = None
    store: Annotated[bool | None, _only(False)] = None
    service_tier: Annotated[str | None, _only("auto", "default")] = None
    min_tokens: Annotated[int | None, _only(0)] = None
    skip_special_tokens: Annotated[bool | None, _only(True)] = None
    include_stop_str_in_output: Annotated[bool | None, _only(False)] = None
    priority: Annotated[int | None, _only(0)] = None
    user: Unused = None
    metadata: Unused = None
    prompt_cache_key: Unused = None
    safety_identifier: Unused = None
    add_special_tokens: Unused = None
    request_id: Unused = None

    default_tokens: ClassVar[int]


class CompletionRequest(Common):
    """A prompt to be continued, or with ``suffix`` a hole to be filled."""

    default_tokens = 16

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = Field(None, description="Only as many as n.")
    logprobs: Annotated[int | None, _only(why=_PROBABILITY)] = None
    top_logprobs: Annotated[int | None, _only(why=_PROBABILITY)] = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]
    name: Unused = None

    def plain(self) -> dict[str, str]:
        """Return it with its parts joined."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class ChatRequest(Common):
    """A conversation to be answered."""

    default_tokens = 256

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    logprobs: Annotated[bool | None, _only(False, why=_PROBABILITY)] = None
    top_logprobs: Annotated[int | None, _only(why=_PROBABILITY)] = None
    response_format: Annotated[dict[str, Any] | None, _only({"type": "text"})] = None
    tools: Annotated[list[Any] | None, _only([])] = None
    functions: Annotated[list[Any] | None, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    function_call: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Annotated[bool | None, _only(False, True)] = None


class TokenizeRequest(Strict):
    """A text to be tokenised."""

    model: str | None = None
    prompt: str
    add_special_tokens: Unused = None


class DetokenizeRequest(Strict):
    """Tokens to be spelled."""

    model: str | None = None
    tokens: list[int]


class EncodeRequest(Strict):
    """A text whose latents are wanted."""

    model: str | None = None
    input: str
    encoding_format: Literal["base64", "float"] | None = Field(None, description="base64 is of float32.")


class DecodeRequest(Strict):
    """Latents to be spelled: rows of numbers, or float32 in base64."""

    model: str | None = None
    latents: str | list[list[float]]


def field_refused(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """Return the refusal of what pydantic says of a request's fields: of the first one."""
    first, name = errors[0], _field_name(errors[0]["loc"])
    if first["type"] == "json_invalid":
        return Refusal(400, "invalid_json", "the body is no JSON")
    if first["type"] == "missing":
        return Refusal(400, "missing_parameter", f"{name or 'the body'} is missing, expected it", name)
    if first["type"] == "extra_forbidden":
        return unknown_field(str(name))
    code = "unsupported_parameter" if first["type"] == "unsupported_parameter" else "invalid_value"
    # A field of several types has an error for each.
    said = dict.fromkeys(error["msg"] for error in errors if _field_name(error["loc"]) == name)
    expected = " or ".join(text.removeprefix("Input should be ").removeprefix("expected ") for text in said)
    return Refusal(400, code, f"{name}={shown(first['input'])}, expected {expected}", name)


def _field_name(place: Sequence[str | int]) -> str | None:
    parts = [str(part) for part in place if part != "body"]
    while len(parts) > 1 and re.search(r"[^a-z_0-9]|^(str|int|float|bool|list|tagged)$", parts[-1]):
        parts.pop()  # Which of a field's types.
    return ".".join(parts) or None


def unknown_field(name: str) -> Refusal:
    """Return the refusal of a field that there is not."""
    names = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *Extension.model_fields]
    leaf = name.rpartition(".")[2]
    hint = nearest(leaf, [known for known in names if known != leaf])
    return Refusal(400, "unknown_parameter", f"unknown field {shown(name)}{hint}", name)


# --- answers -------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens of a request: each prompt once, end tokens and stop strings left out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChoiceDetails(BaseModel):
    """What Colada adds to a choice."""

    seed: int
    settings: dict[str, Any]
    blocks: int
    finish: str
    tokens: list[int] | None = None
    confidence: list[float] | None = None


class TextChoice(BaseModel):
    """A continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None
    colada: ChoiceDetails


class Answered(BaseModel):
    """An assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """An answer to a conversation."""

    index: int
    message: Answered
    finish_reason: Literal["stop", "length"]
    logprobs: None
    colada: ChoiceDetails


class CompletionAnswer(BaseModel):
    """Continuations of all prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ChatAnswer(BaseModel):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    colada: dict[str, Any]


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """A text's tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class Spelled(BaseModel):
    """A text of tokens."""

    prompt: str


class Latents(BaseModel):
    """Normalised posterior means, (L, C)."""

    latents: str | list[list[float]]
    shape: list[int]


class Decoded(BaseModel):
    """The likeliest tokens of latents."""

    text: str
    tokens: list[int]


class Health(BaseModel):
    """Whether requests are taken."""

    status: str


class ErrorDetails(BaseModel):
    """Why not."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetails
