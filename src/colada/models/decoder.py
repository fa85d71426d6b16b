"""A baseline as users see it: the interface of every language model, over a decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, Unpack

import torch

from colada.checks import MOST_TOKENS, require_count, require_flag
from colada.device import check_dtype, find_device
from colada.errors import ColadaError, failure
from colada.files import as_path
from colada.generate.sampling import Sampling
from colada.generate.settings import (
    RELEASED_SETTINGS,
    SAMPLING_SETTINGS,
    Prompt,
    Settings,
    TextRequest,
    listed,
    one_each,
    several,
)
from colada.locate import DECODER_DIR
from colada.models.base import LanguageModel, require_kind
from colada.networks.checkpoint import write_model
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk, Completion, Transcript, completed

DEFAULTS = {name: RELEASED_SETTINGS[name] for name in (*SAMPLING_SETTINGS, "seed", "stop", "end_ids")}
"""Settings that both baselines have."""


@dataclass(frozen=True)
class Writing:
    """What is asked for, of all prompts together.

    Attributes:
        prompts: ids.
        transcripts: one each, which follow what is written and say when it is done.
        seeds: one each, of the token draws.
        sampling: how tokens are picked.
        steps: passes a block, where there are blocks; None for as many as tokens.
    """

    prompts: Sequence[Sequence[int]]
    transcripts: Sequence[Transcript]
    seeds: Sequence[int]
    sampling: Sampling
    steps: int | None = None

    def chunk(self, number: int, block: int, ids: Sequence[int], error: ColadaError | None = None) -> Chunk:
        """Return the chunk of a prompt's new ids, which its transcript takes; or with an error, the last."""
        own, text, tokens = self.transcripts[number], "", tuple[int, ...]()
        if error is None:
            try:
                text, tokens = own.add(ids)
            except Exception as cause:  # Its own: the others have their text.
                error = failure(f"block {block} cannot be read", cause)
        if error is not None:
            own.finish_reason = "error"
        done = None
        if own.finish_reason is not None:
            done = own.completion(self.seeds[number], None if error is None else str(error))
        why = None if done is None else done.error
        return Chunk(number, block, None, text, tokens, own.finish_reason, why, done)


class DecoderLM(LanguageModel):
    """A baseline, ready to use.

    Args:
        decoder: the network; its ``objective`` must be the class's ``arch``.
        tokenizer, origin, generation, chat_template: see :class:`LanguageModel`.

    Raises:
        ColadaError: if the parts do not fit each other.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        origin: str = "",
        generation: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        require_kind("decoder", decoder, Decoder)
        if decoder.config.objective != self.arch:
            raise ColadaError(f"objective={decoder.config.objective!r}, expected {self.arch!r}")
        self.decoder = decoder.eval()
        super().__init__(tokenizer, origin, generation, chat_template)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.decoder.config.vocab_size

    @property
    def training_length(self) -> int | None:
        """Tokens of the rows that it was trained on, where that is known."""
        return self.decoder.config.training_length

    @training_length.setter
    def training_length(self, length: int | None) -> None:
        self.decoder.config = replace(self.decoder.config, training_length=length)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.decoder.wte.weight.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or convert the network in place, and return self."""
        place = None if device is None else find_device(device)
        check_dtype(dtype)
        self.decoder.to(place, dtype)
        return self

    def save(self, directory: str | Path) -> None:
        """Write ``decoder/``, tokenizer and settings; see :func:`colada.networks.checkpoint.write_model`."""
        networks = {DECODER_DIR: self.decoder}
        write_model(as_path(directory), networks, self.tokenizer, self.generation, self.chat_template)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 64, **settings: Unpack[Settings]
    ) -> list[Completion]:
        """Continue every prompt, in one batch; see :meth:`LanguageModel.generate`."""
        writing = self._writing(prompts, max_new_tokens, settings)
        done = {
            chunk.index: chunk.completion for chunk in self._chunks(writing) if chunk.completion is not None
        }
        return completed([done[index] for index in sorted(done)])

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        guesses: bool = False,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """Yield a chunk after every token or block of every prompt; there are no guesses."""
        require_flag("guesses", guesses)
        return self._chunks(self._writing(prompts, max_new_tokens, settings))

    def complete(self, requests: Iterable[TextRequest], batch: int = 16) -> Iterator[tuple[int, Completion]]:
        """See :meth:`LanguageModel.complete`: requests of equal length and settings share a batch."""
        batch = require_count("batch", batch)
        alike: dict[str, list[tuple[int, Writing]]] = {}
        for number, own in enumerate(listed(requests)):
            writing = self._writing([own.prompt], own.max_new_tokens, own.settings)
            rest = {name: value for name, value in own.settings.items() if name != "seed"}
            key = repr((own.max_new_tokens, sorted(rest.items())))
            alike.setdefault(key, []).append((number, writing))
        return self._completions(list(alike.values()), batch)

    def _completions(
        self, alike: Sequence[Sequence[tuple[int, Writing]]], batch: int
    ) -> Iterator[tuple[int, Completion]]:
        for group in alike:
            for start in range(0, len(group), batch):
                numbers = [number for number, _ in group[start : start + batch]]
                parts = [writing for _, writing in group[start : start + batch]]
                writing = replace(
                    parts[0],
                    prompts=[part.prompts[0] for part in parts],
                    transcripts=[part.transcripts[0] for part in parts],
                    seeds=[part.seeds[0] for part in parts],
                )
                for chunk in self._chunks(writing):
                    if chunk.completion is not None:
                        yield numbers[chunk.index], chunk.completion

    def _writing(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int, settings: Settings
    ) -> Writing:
        prompts = several(prompts)
        max_new_tokens = require_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
        chosen = self.chosen(settings)
        stop, end_ids = self.endings(chosen)
        steps = chosen.get("steps")
        size = self.decoder.config.block_size
        if steps is not None and steps > size:
            raise ColadaError(f"steps={steps}, expected at most the {size} tokens of a block")
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        return Writing(
            ids,
            [Transcript(self.tokenizer, 0, max_new_tokens, stop, end_ids, own) for own in ids],
            one_each("seed", chosen["seed"], len(prompts), 1),
            Sampling(**{name: chosen[name] for name in SAMPLING_SETTINGS}),
            steps,
        )

    def _fault(self, error: Exception) -> ColadaError:
        """Return why one prompt of many gets no more tokens."""
        return failure(self.origin or "the model", error)

    def _chunks(self, writing: Writing) -> Iterator[Chunk]:
        return self._run(writing) if writing.prompts else iter(())

    @abstractmethod
    def _run(self, writing: Writing) -> Iterator[Chunk]:
        """Write until every transcript has a finish reason; there is at least one prompt."""
