"""What every model that writes has in common, whatever its architecture."""

from __future__ import annotations

import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch

from colada.checks import MOST_TOKENS, check_ids, check_text, require_count, require_flag
from colada.device import check_dtype, find_device
from colada.errors import ColadaError, ColadaWarning, failure, nearest, shown
from colada.files import as_path
from colada.generate.canvas import Canvas
from colada.generate.reference import TransportStep
from colada.generate.session import Session
from colada.generate.settings import (
    Prompt,
    RequestSettings,
    Settings,
    TextRequest,
    check_settings,
    per_prompt,
    settings_of_each,
    several,
    with_built_in,
)
from colada.generate.writer import Request, Writer
from colada.locate import CHAT_TEMPLATE_FILE, IMAGE_DIR, is_hub_id
from colada.networks.checkpoint import write_model
from colada.text.chat import check_messages, render
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk, Completion, Transcript

BATCH = 64
"""How many prompts of a call are under way together."""
ARCHITECTURES = {"cola": "Cola DLM", "ar": "AR", "llada": "LLaDA"}
"""By name, what readers call it."""


def find_archs(names: str) -> tuple[str, ...]:
    """Return architectures, named with commas between.

    Raises:
        ColadaError: for an unknown one, with the nearest, or one that is there twice.
    """
    archs = tuple(name.strip() for name in names.split(","))
    for name in archs:
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ColadaError(
                f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}, expected some of {known}"
            )
        if archs.count(name) > 1:
            raise ColadaError(f"architectures {names}: {name!r} is there twice")
    return archs


def require_kind(name: str, value: object, kind: type, optional: bool = False) -> None:
    """Raise ColadaError unless a value is of a type, or None where it is optional."""
    if not isinstance(value, kind) and not (optional and value is None):
        raise ColadaError(f"{name}={shown(value)}, expected a {kind.__name__}{' or None' * optional}")


class LanguageModel(ABC):
    """A model that continues texts: :class:`~colada.models.cola.ColaDLM`, or a baseline.

    Args:
        tokenizer: without one, prompts are ids and text is empty.
        origin: where the model is from.
        generation: settings with which this model measures best, over :attr:`defaults`.
        chat_template: how :meth:`chat` writes conversations; Jinja, see :mod:`colada.text.chat`.

    Raises:
        ColadaError: if the tokenizer or the settings do not fit.
    """

    arch: ClassVar[str]
    """One of :data:`ARCHITECTURES`."""

    defaults: ClassVar[Mapping[str, Any]]
    """The settings that this kind of model has, and their values."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        origin: str,
        generation: Mapping[str, Any] | None,
        chat_template: str | None,
    ) -> None:
        require_kind("tokenizer", tokenizer, Tokenizer, optional=True)
        require_kind("origin", origin, str)
        require_kind("chat_template", chat_template, str, optional=True)
        self.tokenizer, self.origin, self.chat_template = tokenizer, origin, chat_template
        self._warned = False
        if tokenizer is not None and tokenizer.vocab_size > self.vocab_size:
            raise ColadaError(
                f"{origin or 'model'}: the tokenizer has {tokenizer.vocab_size} entries, "
                f"the model vocab_size={self.vocab_size}"
            )
        self.generation = self.check(
            {} if generation is None else generation, f"{origin}: generation settings"
        )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Ids are below it."""

    @property
    @abstractmethod
    def networks(self) -> dict[str, Any]:
        """All networks, each by the folder that it is saved in; the one that writes is the first."""

    @property
    def built_in(self) -> Mapping[str, Any] | None:
        """Guidance and grids that are part of the weights, of a distilled model."""
        return None

    @property
    def _first(self) -> Any:
        return next(iter(self.networks.values()))

    @property
    def training_length(self) -> int | None:
        """Tokens of the rows that it was trained on, where that is known; it goes with a saved model."""
        length: int | None = self._first.config.training_length
        return length

    @training_length.setter
    def training_length(self, length: int | None) -> None:
        self._first.config = replace(self._first.config, training_length=length)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        place: torch.device = next(self._first.parameters()).device
        return place

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or convert the weights in place, and return self; a picture codec stays in float32."""
        place = None if device is None else find_device(device)
        check_dtype(dtype)
        for folder, network in self.networks.items():
            network.to(place, None if folder == IMAGE_DIR else dtype)
        return self

    def save(self, directory: str | Path, int8: bool = False) -> None:
        """Write a directory that :func:`colada.load` reads; see :func:`checkpoint.write_model`.

        Args:
            int8: in half of bfloat16's bytes: the matrices of the DiT's or a baseline's blocks by row.

        Raises:
            ColadaError: if it cannot be written.
        """
        parts = (self.tokenizer, self.generation, self.chat_template)
        write_model(as_path(directory), self.networks, *parts, int8)

    # --- writing ---------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt | TextRequest],
        max_new_tokens: int = 64,
        *,
        batch: int = BATCH,
        callback: Callable[[TransportStep], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Completion]:
        """Continue every prompt.

        This is also how many texts are written: ``batch`` at a time, and as some leave, others join. A text
        depends on its own prompt, settings and seed, not on who shares the batch.

        Args:
            prompts: texts, or lists of ids; one or several. An empty prompt generates from nothing. Those
                with a length and settings of their own are given as :class:`TextRequest`.
            max_new_tokens: how many tokens each gets, exactly, unless an end token or stop string is first.
            batch: how many are under way together.
            callback: sees the latents of all who are under way after every solver step, of models that have
                such a thing.
            progress: called after every prompt with how many are finished, and of how many.
            settings: see :class:`Settings`.

        Returns: one completion a prompt, in order.

        Raises:
            ColadaError: naming the argument at fault, before anything is written.
            GenerationError: if some failed; it carries the completions of the others.
        """
        return self._session_of(prompts, max_new_tokens, batch, settings).completions(callback, progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt | TextRequest],
        max_new_tokens: int = 64,
        *,
        batch: int = BATCH,
        guesses: bool = False,
        callback: Callable[[TransportStep], None] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """Yield a chunk after every block (AR: token) of every prompt; arguments as :meth:`generate`.

        The texts of a prompt's finished chunks add up to what :meth:`generate` returns, which its last chunk
        has as ``completion``. With ``guesses``, yield after every solver step too, of models that have such a
        thing: how the block would read if it ended there. Arguments are checked here, before the first chunk
        is asked for. A prompt that fails ends with a chunk that says why, and the others go on.
        """
        guesses = require_flag("guesses", guesses)
        return self._session_of(prompts, max_new_tokens, batch, settings, guesses).chunks(callback)

    def session(self, *, capacity: int = 8192, slots: int | None = None) -> Session:
        """Return a session, to which requests with settings of their own may be submitted at any time.

        Args:
            capacity: positions that its KV cache holds (latents, or a baseline's tokens), of all requests
                under way together; a request takes those of its prompt and of what is to come, and waits
                until there is room.
            slots: requests under way at most; None is no limit.
        """
        capacity = require_count("capacity", capacity)
        slots = None if slots is None else require_count("slots", slots)
        return Session(self._writer(capacity, slots), self._open)

    @abstractmethod
    def _writer(self, capacity: int, slots: int | None) -> Writer[Any]:
        """Return what writes the requests of a session."""

    @abstractmethod
    def _writer_for(self, requests: Sequence[Request], slots: int) -> Writer[Any]:
        """Return what writes these requests alone, with just the KV cache that ``slots`` of them need."""

    def _keep(self, writer: Any) -> None:  # noqa: B027 - most have nothing to keep
        """Take back what :meth:`_writer_for` has returned, once all is written."""

    @abstractmethod
    def _request(
        self, ids: Sequence[int], max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, int]:
        """Return what the writer takes, and how many tokens of its first block are the prompt's.

        Raises:
            ColadaError: if there is no memory for so long a prompt, or for settings that do not fit it.
        """

    def _hole(
        self, prompt: Prompt, suffix: Prompt, max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, Transcript]:
        """Return the request of a hole between two texts, and its transcript; of models that fill some.

        Raises:
            ColadaError: naming the argument at fault.
        """
        raise ColadaError(f"suffix={shown(suffix)}, but {ARCHITECTURES[self.arch]} fills no holes")

    def _open(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        settings: Mapping[str, Any],
        suffix: Prompt | None = None,
    ) -> tuple[Request, Transcript]:
        """Return the request of a prompt alone, and the transcript that follows it.

        Raises:
            ColadaError: naming the argument at fault.
        """
        if suffix is not None and settings.get("stop"):
            raise ColadaError(f"stop={shown(settings['stop'])} with a suffix, expected none")
        (request_settings,) = settings_of_each(self.chosen(settings), 1)
        if suffix is not None:
            return self._hole(prompt, suffix, max_new_tokens, request_settings)
        return self._continuation(prompt, max_new_tokens, request_settings)

    def _continuation(
        self, prompt: Prompt, max_new_tokens: int, settings: RequestSettings
    ) -> tuple[Request, Transcript]:
        """Return the request of a prompt with checked settings, and its transcript; raises as `_open`."""
        count = require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
        ids, (stop, end_ids) = self.prompt_ids(prompt), self.endings(settings)
        request, skip = self._request(ids, count, settings)
        whole = settings.whole_sentences
        return request, Transcript(self.tokenizer, skip, count, stop, end_ids, ids, whole)

    def _session_of(
        self,
        prompts: Any,
        max_new_tokens: int,
        batch: int,
        settings: Mapping[str, Any],
        guesses: bool = False,
    ) -> Session:
        """Return a session of these prompts alone, in whose slots they take turns."""
        batch, asked = require_count("batch", batch), self.check(settings)
        merged = partial(with_built_in, {**self.defaults, **self.generation}, built_in=self.built_in)
        chosen, listed, opened = merged(asked), several(prompts), []
        for prompt, over in zip(listed, per_prompt(chosen, len(listed)), strict=True):
            text, length = prompt, max_new_tokens
            if isinstance(prompt, TextRequest):
                text, length, over = prompt.prompt, prompt.max_new_tokens, over | self.check(prompt.settings)
            (request_settings,) = settings_of_each(merged({**asked, **over}), 1)
            opened.append(self._continuation(text, length, request_settings))
        return self._session_for(opened, batch, guesses)

    def _session_for(
        self, opened: Sequence[tuple[Request, Transcript | Canvas]], slots: int, guesses: bool = False
    ) -> Session:
        """Return a session of these requests alone, each with the transcript that follows it."""
        session = Session(self._writer_for([request for request, _ in opened], slots), self._open, self._keep)
        for request, transcript in opened:
            session.add(request, transcript, guesses)
        return session

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        message: str = "Upload model",
    ) -> str:
        """Save the model to a hub repository, made if need be, which :func:`colada.load` reads by its id.

        Args:
            repo_id: owner/name.
            private: make a new repository private.
            revision: branch; the main one if None.
            token: of the hub; by default the one that its own command line has stored.
            message: of the commit.

        Returns: the commit's address.

        Raises:
            ColadaError: for what is no hub id, a model that cannot be saved, or a hub that refuses or cannot
                be reached.
        """
        require_kind("message", message, str)
        require_kind("revision", revision, str, optional=True)
        if not isinstance(repo_id, str) or not is_hub_id(repo_id):
            raise ColadaError(f"repo_id={shown(repo_id)}, expected a hub id of the form owner/name")
        # 0.4 s that only the hub should cost.
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / "model"
            self.save(folder)
            try:
                hub = HfApi(token=token)
                hub.create_repo(repo_id, private=private, exist_ok=True)
                if revision is not None:
                    hub.create_branch(repo_id, branch=revision, exist_ok=True)
                commit = hub.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
                )
            except Exception as error:  # The hub's HTTP library has errors of its own.
                raise failure(f"{repo_id} cannot be written to the hub", error) from error
        return str(commit.commit_url)

    def chosen(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of a generation: those asked for, else the model's own, else the defaults.

        What a distilled prior has built in goes before what is stored, which may be its teacher's.

        Raises:
            ColadaError: for one of the wrong type, that this kind of model does not have, or that does not
                fit what is built in.
        """
        return with_built_in({**self.defaults, **self.generation}, self.check(settings), self.built_in)

    @classmethod
    def check(cls, settings: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
        """Return settings once checked, see :func:`check_settings`, and that this kind of model has them."""
        checked = check_settings(settings, origin)
        for name, value in checked.items():
            if name not in cls.defaults:
                where = f"{origin}: " if origin else ""
                raise ColadaError(
                    f"{where}{name}={shown(value)}, but {ARCHITECTURES[cls.arch]} has no {name}"
                )
        return checked

    def ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids: a text's tokens, or the ids themselves once checked.

        Raises:
            ColadaError: for a text without a tokenizer, an id outside the vocabulary, or too long a prompt.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ColadaError("this model has no tokenizer.json: give prompts as lists of ids")
            prompt = self.tokenizer.encode(check_text(prompt))
        return check_ids(prompt, self.vocab_size)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt that is to be continued; once, one longer than training rows is noted.

        Raises:
            ColadaError: as :meth:`ids`.
        """
        ids, length = self.ids(prompt), self.training_length
        if length is not None and len(ids) > length and not self._warned:
            self._warned = True
            rows = f"{self.origin or 'the model'} was trained on rows of {length} tokens"
            text = (
                f"a prompt of {len(ids)} tokens, but {rows}: what it writes after a longer one may be worse"
            )
            warnings.warn(text, ColadaWarning, stacklevel=4)
        return ids

    def endings(self, settings: RequestSettings) -> tuple[list[str], list[int]]:
        """Return stop strings, and end tokens: the tokenizer's if None.

        Raises:
            ColadaError: for stop strings or whole sentences without a tokenizer, or an end token outside the
                vocabulary.
        """
        stop, end_ids = settings.stop, settings.end_ids
        stops = [stop] if isinstance(stop, str) else list(stop)
        if self.tokenizer is None and (stops or settings.whole_sentences):
            what = "stop strings need" if stops else "whole_sentences=True needs"
            raise ColadaError(f"{what} a tokenizer, and this model has none")
        if end_ids is None:
            end_ids = self.tokenizer.end_ids if self.tokenizer is not None else ()
        return stops, check_ids(end_ids, self.vocab_size, "end_ids:")

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int = 256, **settings: Unpack[Settings]
    ) -> Completion:
        """Return the assistant's answer to a conversation, without the token that ends it.

        Args:
            messages: objects with ``role`` and ``content``, as in training.
            max_new_tokens, settings: see :meth:`generate`.

        Raises:
            ColadaError: if the model has no chat template, or for a malformed conversation.
        """
        return self.generate([self.chat_prompt(messages)], max_new_tokens, **settings)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as the text that the assistant's answer continues; raises as :meth:`chat`."""
        if self.tokenizer is None:
            raise ColadaError("this model has no tokenizer.json, and a chat is text")
        if self.chat_template is None:
            raise ColadaError(
                f"{self.origin or 'this model'} has no chat template ({CHAT_TEMPLATE_FILE}): "
                "put one into its directory, or set chat_template"
            )
        listed = (
            list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else messages
        )
        checked = check_messages(listed, self.tokenizer, "chat")
        return render(checked, self.tokenizer, self.chat_template, "chat", answer=True)
