"""``ColaDLM``: the two networks and their tokenizer as one model, and :func:`load`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from colada.chat import check_messages, read_template, render
from colada.checkpoint import (
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    check_pair,
    find_tokenizer,
    locate,
    read_dit,
    read_json,
    read_vae,
    write_model,
)
from colada.dit import DiT
from colada.errors import ColadaError, nearest
from colada.flow import choose
from colada.generation import NOISE_RULES, SEED_STRIDE, BlockGenerator, Noise, TransportStep
from colada.sampling import Sampling
from colada.streaming import Chunk, Completion, Transcript
from colada.tokenizer import Tokenizer
from colada.vae import TextVAE

BUNDLED = Path(__file__).parent / "bundled"

Prompt = str | Sequence[int]


class Settings(TypedDict, total=False):
    """Generation settings; those left out, or None, are the model's own, or else the released ones.

    Attributes:
        steps: solver steps per block (released: 16).
        guidance: scale s of v = u + s (c - u); 1 is off (released: 7). One for all, or one each.
        solver, schedule: names in ``colada.flow.SOLVERS`` and ``SCHEDULES`` (released: "euler", "uniform").
        temperature, top_k, top_p, repetition_penalty: see :class:`~colada.sampling.Sampling` (greedy).
        seed: one for all (sample i then has seed + i), or one each. A sample's result depends on
            its own prompt, settings and seed, not on the batch it is in.
        stop: strings that end the text; they may straddle blocks.
        end_ids: tokens that end the text; the tokenizer's end tokens if None, ``()`` for none.
        noise: "per-sample", or "released" for the released code's rule, where sample i of a single
            seed has seed + 1000 i (the published scores have seed 66).
    """

    steps: int | None
    guidance: float | Sequence[float] | None
    solver: str | None
    schedule: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | None
    end_ids: Sequence[int] | None
    noise: str | None


RELEASED_SETTINGS: dict[str, Any] = {
    "steps": 16,
    "guidance": 7.0,
    "solver": "euler",
    "schedule": "uniform",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop": (),
    "end_ids": None,
    "noise": "per-sample",
}
"""What a model without a ``generation_config.json`` of its own uses."""

_NUMBER, _SEVERAL = (int, float), (list, tuple)
_SETTING_TYPES: dict[str, Any] = {
    "steps": int,
    "solver": str,
    "schedule": str,
    "temperature": _NUMBER,
    "top_k": int,
    "top_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": (int, *_SEVERAL),
    "guidance": (*_NUMBER, *_SEVERAL),
    "stop": (str, *_SEVERAL),
    "end_ids": _SEVERAL,
    "noise": str,
}
_KIND_NAMES = {int: "a whole number", str: "a name", _NUMBER: "a number", _SEVERAL: "a list of ids"}
_KIND_NAMES |= {(int, *_SEVERAL): "a whole number of at least 0, or one for each prompt"}
_KIND_NAMES |= {(*_NUMBER, *_SEVERAL): "a finite number, or one for each prompt"}
_KIND_NAMES |= {(str, *_SEVERAL): "a string, or several"}


def check_settings(settings: Mapping[str, Any], origin: str = "") -> None:
    """Raise ColadaError for a generation setting that does not exist or is of the wrong type."""
    where = f"{origin}: " if origin else ""
    for name, value in settings.items():
        if name not in _SETTING_TYPES:
            raise ColadaError(f"{where}unknown generation setting {name!r}{nearest(name, _SETTING_TYPES)}")
        kind = _SETTING_TYPES[name]
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ColadaError(f"{where}{name}={value!r}, expected {_KIND_NAMES[kind]}")


@dataclass(frozen=True)
class Reconstruction:
    """Tokens through the Text VAE and back: the text, its ids, and the share that equal the original's."""

    text: str
    tokens: tuple[int, ...]
    accuracy: float


class ColaDLM:
    """A continuous latent diffusion language model, ready to use.

    Args:
        vae, dit: the networks; their widths and block sizes must agree.
        tokenizer: without one, prompts are ids and text is empty.
        origin: where the model is from, for :attr:`origin`.
        generation: settings with which this model measures best, over the released ones.
        chat_template: how :meth:`chat` writes conversations; Jinja, see :mod:`colada.chat`.

    Raises:
        ColadaError: if the parts do not fit each other.
    """

    def __init__(
        self,
        vae: TextVAE,
        dit: DiT,
        tokenizer: Tokenizer | None = None,
        *,
        origin: str = "",
        generation: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        check_pair(vae.config, dit.config)
        if tokenizer is not None and tokenizer.vocab_size > vae.config.vocab_size:
            raise ColadaError(
                f"{origin or 'model'}: the tokenizer has {tokenizer.vocab_size} entries, "
                f"the Text VAE vocab_size={vae.config.vocab_size}"
            )
        check_settings(generation or {}, f"{origin}: generation settings")
        self.vae, self.dit, self.tokenizer, self.origin = vae.eval(), dit.eval(), tokenizer, origin
        self.generation = dict(generation or {})
        self.chat_template = chat_template

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.dit.txt_in.proj.weight.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ColaDLM:
        """Move or convert both networks in place, and return self."""
        self.vae.to(device, dtype)
        self.dit.to(device, dtype)
        return self

    def save(self, directory: str | Path) -> None:
        """Write the model in the released format, with its tokenizer; see :func:`checkpoint.write_model`."""
        save_tokenizer = self.tokenizer.save if self.tokenizer is not None else None
        write_model(Path(directory), self.vae, self.dit, save_tokenizer, self.generation, self.chat_template)

    # --- tokens and latents ----------------------------------------------------------------

    def ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids: a text's tokens, or the ids themselves once checked.

        Raises:
            ColadaError: for a text without a tokenizer, or an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ColadaError("this model has no tokenizer.json: give prompts as lists of ids")
            return self.tokenizer.encode(prompt)
        vocab = self.vae.config.vocab_size
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise ColadaError(f"prompt id {token!r}, expected whole numbers from 0 to {vocab - 1}")
        return list(prompt)

    @property
    def pad_id(self) -> int:
        """The padding id: the tokenizer's, or ``pad_token_id`` of the Text VAE's config."""
        if self.tokenizer is not None:
            return self.tokenizer.pad_id
        if self.vae.config.pad_token_id is None:
            raise ColadaError(
                "no padding id is known: the model has no tokenizer, its config no pad_token_id"
            )
        return self.vae.config.pad_token_id

    @torch.inference_mode()
    def encode(self, text: Prompt) -> torch.Tensor:
        """Return the normalised posterior means of a text, float32 (ceil(tokens / patch_size), C)."""
        ids = self.ids(text)
        if not ids:
            return torch.zeros(0, self.vae.config.latent_dim, device=self.device)
        latents = BlockGenerator(self.vae, self.dit).encode([ids], self.pad_id)[0]
        return latents[: -(-len(ids) // self.vae.config.patch_size)]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> list[int]:
        """Return the likeliest ids of normalised latents (L, C): L * patch_size of them."""
        if latents.ndim != 2 or latents.shape[1] != self.vae.config.latent_dim:
            raise ColadaError(
                f"latents of shape {tuple(latents.shape)}, expected (L, {self.vae.config.latent_dim})"
            )
        if len(latents) == 0:
            return []
        ids: list[int] = self.vae.decode(latents.to(self.device), [len(latents)]).argmax(-1).tolist()
        return ids

    def reconstruct(self, text: Prompt) -> Reconstruction:
        """Send a text through the Text VAE and back.

        Raises:
            ColadaError: for an empty text.
        """
        ids = self.ids(text)
        if not ids:
            raise ColadaError("nothing to reconstruct: the text has no tokens")
        out = self.decode(self.encode(ids))[: len(ids)]
        correct = sum(a == b for a, b in zip(ids, out, strict=True))
        text = self.tokenizer.decode(out, skip_special=False) if self.tokenizer is not None else ""
        return Reconstruction(text, tuple(out), correct / len(ids))

    # --- generation ------------------------------------------------------------------------

    def _engine(self, chosen: Mapping[str, Any]) -> BlockGenerator:
        sampling = {key: chosen[key] for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
        return BlockGenerator(
            self.vae,
            self.dit,
            steps=chosen["steps"],
            solver=chosen["solver"],
            schedule=chosen["schedule"],
            sampling=Sampling(**sampling),
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        callback: Callable[[TransportStep], None] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Completion]:
        """Continue every prompt, in one batch.

        Args:
            prompts: texts, or lists of ids; one or several. An empty prompt generates from nothing.
            max_new_tokens: how many tokens each gets, exactly, unless an end token or stop string is first.
            callback: sees the latents after every solver step.
            settings: see :class:`Settings`.

        Returns: one completion a prompt, in order.

        Raises:
            ColadaError: naming the argument at fault.
        """
        job = self._open(prompts, max_new_tokens, settings)
        for _ in self._run(job, guesses=False, callback=callback):
            pass
        return [
            Completion(own.text, tuple(own.tokens), own.finish_reason or "length", seed)
            for own, seed in zip(job.transcripts, job.seeds, strict=True)
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        guesses: bool = False,
        callback: Callable[[TransportStep], None] | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """Yield a chunk after every block of every prompt; arguments as :meth:`generate`.

        With ``guesses``, yield after every solver step too: how the block would read if it
        ended there. The texts of a prompt's finished chunks add up to what :meth:`generate`
        returns. Arguments are checked here, before the first chunk is asked for.
        """
        job = self._open(prompts, max_new_tokens, settings)
        return self._run(job, guesses, callback)

    def _open(self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int, settings: Settings) -> _Job:
        """Check the arguments of :meth:`generate`, and make of them what a run needs."""
        several = _several(prompts)
        _require_count("max_new_tokens", max_new_tokens)
        check_settings(settings)
        chosen = {**RELEASED_SETTINGS, **self.generation}
        chosen |= {name: value for name, value in settings.items() if value is not None}
        rule = chosen["noise"]
        new_noise = choose("noise", rule, NOISE_RULES)
        seeds = _one_each("seed", chosen["seed"], len(several), SEED_STRIDE[rule])
        guidance = _one_each("guidance", chosen["guidance"], len(several), 0)
        stop = [chosen["stop"]] if isinstance(chosen["stop"], str) else list(chosen["stop"])
        if stop and self.tokenizer is None:
            raise ColadaError("stop strings need a tokenizer, and this model has none")
        if "" in stop:
            raise ColadaError("stop='', expected strings of at least one character")
        end_ids = chosen["end_ids"]
        if end_ids is None:
            end_ids = self.tokenizer.end_ids if self.tokenizer is not None else ()
        engine = self._engine(chosen)
        shape = (self.vae.config.block_size, self.vae.config.latent_dim)
        ids = [self.ids(prompt) for prompt in several]
        transcripts = [
            Transcript(self.tokenizer, self._tail_tokens(own), max_new_tokens, stop, end_ids) for own in ids
        ]
        noises = [new_noise(seed, shape, self.device) for seed in seeds]
        return _Job(engine, ids, transcripts, seeds, noises, guidance)

    @torch.inference_mode()
    def _run(
        self, job: _Job, guesses: bool, callback: Callable[[TransportStep], None] | None
    ) -> Iterator[Chunk]:
        """Run a job block by block; a sample leaves the batch when it is finished."""
        pad_id = self.pad_id if any(job.ids) else 0
        samples = job.engine.start(job.ids, job.noises, job.seeds, job.guidance, pad_id)
        active = list(range(len(samples)))
        while active:
            under_way = [samples[index] for index in active]
            for step in job.engine.next_block(under_way):
                if callback is not None:
                    callback(step)
                if guesses:
                    for index, ids in zip(active, job.engine.spell(under_way, step.z0), strict=True):
                        text, tokens = job.transcripts[index].guess(ids)
                        yield Chunk(index, samples[index].blocks, step.step, text, tokens)
            for index, sample in zip(active, under_way, strict=True):
                assert sample.block is not None
                text, tokens = job.transcripts[index].add(sample.block.ids)
                reason = job.transcripts[index].finish_reason
                yield Chunk(index, sample.blocks - 1, None, text, tokens, reason)
            active = [index for index in active if job.transcripts[index].finish_reason is None]

    def _tail_tokens(self, ids: Sequence[int]) -> int:
        """Return how many tokens the first block only repeats: those of the prompt's pinned latents."""
        patch, size = self.vae.config.patch_size, self.vae.config.block_size
        return -(-len(ids) // patch) % size * patch

    @torch.inference_mode()
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
        checked = check_messages(list(messages), self.tokenizer, "chat")
        return render(checked, self.tokenizer, self.chat_template, "chat", answer=True)

    def infill(self, before: Prompt, after: Prompt, tokens: int, **settings: Unpack[Settings]) -> Completion:
        """Fill a hole of exactly ``tokens`` tokens between two texts.

        The hole's latents are generated with their neighbours in the same blocks pinned; the
        surroundings are encoded with the hole's tokens masked. Blocks being causal, what comes
        after the hole's last block is not seen. Sampling settings as :meth:`generate`; ``stop``
        and ``end_ids`` do not apply.

        Raises:
            ColadaError: as :meth:`generate`; or if the hole does not fall on whole latents (patch_size > 1).
        """
        _require_count("tokens", tokens)
        left, right = self.ids(before), self.ids(after)
        patch, size = self.vae.config.patch_size, self.vae.config.block_size
        if len(left) % patch or tokens % patch:
            raise ColadaError(
                f"a hole of {tokens} tokens after {len(left)}, expected multiples of patch_size={patch}"
            )
        job = self._open([[]], tokens, {**settings, "stop": (), "end_ids": ()})
        start, end = len(left) // patch, (len(left) + tokens) // patch
        whole = [*left, *[self.vae.config.mask_id] * tokens, *right]
        latents = job.engine.encode([whole], self.pad_id)[0]
        prefix, last = start // size * size, -(-end // size) * size
        sample = job.engine.start([[]], job.noises, job.seeds, job.guidance, self.pad_id)[0]
        job.engine.prefix_pass([sample], [latents[:prefix]])
        known = torch.ones(min(last, -(-len(whole) // patch)) - prefix, dtype=torch.bool, device=self.device)
        known[start - prefix : end - prefix] = False
        sample.known, sample.pinned = known, latents[prefix : prefix + len(known)]
        ids: list[int] = []
        while prefix * patch + len(ids) < end * patch:
            for _ in job.engine.next_block([sample]):
                pass
            assert sample.block is not None
            ids += sample.block.ids
        skip = len(left) - prefix * patch
        transcript = job.transcripts[0]
        transcript.add(ids[skip : skip + tokens])
        return Completion(transcript.text, tuple(transcript.tokens), "length", job.seeds[0])


@dataclass(frozen=True)
class _Job:
    """A checked request: the engine, and per prompt its ids, transcript, seed, noise and guidance."""

    engine: BlockGenerator
    ids: list[list[int]]
    transcripts: list[Transcript]
    seeds: list[int]
    noises: list[Noise]
    guidance: list[float]


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return a list of prompts, of one or of several."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(part, int) for part in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ColadaError(f"{name}={value!r}, expected a whole number of at least 1")


def _one_each(name: str, value: Any, count: int, stride: int) -> list[Any]:
    """Return a setting per sample: its list, checked, or value + stride * i."""
    if isinstance(value, Sequence):
        values = list(value)
    elif isinstance(value, int | float):
        values = [value + stride * i for i in range(count)]
    else:
        values = [value] * count
    if len(values) != count:
        raise ColadaError(f"{len(values)} values of {name} for {count} prompts, expected one, or one each")
    for one in values:
        if name == "seed" and not (isinstance(one, int) and one >= 0):
            raise ColadaError(f"seed={one!r}, expected a whole number of at least 0")
        if name == "guidance" and not (isinstance(one, int | float) and math.isfinite(one)):
            raise ColadaError(f"guidance={one!r}, expected a finite number")
    return values


def load(
    where: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> ColaDLM:
    """Load a model.

    Args:
        where: nothing for the bundled model, a directory in the released format, or a hub
            repository id (downloaded on first use).
        revision: branch, tag or commit of a hub repository.
        device: where to put the networks.
        dtype: convert the weights; by default they keep the file's type, except the bundled
            model's, which are stored in bfloat16 to be small and computed in float32.
            Weights of the wanted type are mapped from the file, not copied.

    Raises:
        ColadaError: if the model cannot be found, read or is inconsistent.
    """
    if where is None and not BUNDLED.is_dir():
        raise ColadaError("this installation has no bundled model: give a directory or a hub id")
    if where is None and dtype is None:
        dtype = torch.float32
    directory = locate(BUNDLED if where is None else where, revision)
    file = find_tokenizer(directory)
    settings, template = directory / GENERATION_FILE, directory / CHAT_TEMPLATE_FILE
    return ColaDLM(
        read_vae(directory, dtype, device),
        read_dit(directory, dtype, device),
        Tokenizer.from_file(file) if file is not None else None,
        origin="bundled" if where is None else str(where),
        generation=read_json(settings) if settings.is_file() else None,
        chat_template=read_template(template) if template.is_file() else None,
    )
