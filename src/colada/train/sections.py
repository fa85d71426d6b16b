"""The sections of a recipe beside its stages: every key with its default, its bounds and what it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from colada.data.sources import Section, Source
from colada.train.kinds import MOST_ROWS, MOST_STEPS, MOST_TOKENS


class PictureSource(Section):
    """Pictures with captions, see :func:`colada.pictures.sources.open_source`."""

    path: str = Field(
        min_length=1,
        description="Folder with captions.tsv, .parquet file or folder of such, or shapes:",
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="Its share of the pictures.")


class DataSection(Section):
    """Where the text is and how it becomes rows."""

    sources: tuple[Source, ...] = Field(
        (Source(path="data"),),
        min_length=1,
        description="Where the text is; several are mixed by weight.",
    )
    pictures: tuple[PictureSource, ...] = Field((), description="Where pictures with captions are.")
    fitted_on: int = Field(
        20_000, ge=1, le=2**24, description="Pictures that a linear codec of pictures is fitted to at most."
    )
    validation_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Share of samples never trained on, where a source has no split.",
    )
    packing: Literal["stream", "samples"] = Field(
        "stream",
        description="stream: rows are cut from all text end to end and see across end-of-text tokens;"
        " samples: whole documents or conversations, padded to whole blocks, which never see each other.",
    )
    align: float = Field(
        0.5, ge=0, le=1, description="Share of stream rows moved to begin with a document's first token."
    )
    chat_template: str | None = Field(
        None,
        description="Jinja file for conversations; unset: that of model.init, else ChatML, or roles as words"
        " where its tokens are not there or not spelled.",
    )
    cache: str | None = Field(
        None,
        description="Directory of token shards, reusable by other runs; unset: shards/ of the run.",
    )
    workers: int | None = Field(
        None, ge=1, le=1024, description="Processes that tokenise; unset: one a CPU core."
    )

    @model_validator(mode="after")
    def _whole_samples(self) -> DataSection:
        for source in self.sources:
            if source.format != "text" and self.packing != "samples":
                what = f"format={source.format!r} of {source.name}"
                raise ValueError(f"packing={self.packing!r} with {what}, expected 'samples'")
        return self

    @property
    def chats(self) -> bool:
        """Whether there are conversations."""
        return any(source.conversations for source in self.sources)


class TokenizerSection(Section):
    """A byte-level BPE trained on the run's own text, or the ``file`` of another."""

    vocab_size: int = Field(
        8192,
        ge=260,
        le=2**24,
        description="Entries: 256 bytes, 4 special tokens, merges; not looked at with file or model.init.",
    )
    characters: int = Field(
        10**9,
        ge=1000,
        le=10**12,
        description="It is trained on so many characters at most, of all sources alike: the rest would"
        " change little.",
    )
    file: str | None = Field(
        None, description="A tokenizer.json to use; unset: train one, or that of model.init."
    )


class ModelSection(Section):
    """What is trained: a model to continue from, or the configurations of a new one."""

    arch: Literal["cola", "ar", "llada"] = Field(
        "cola", description="Cola DLM, or a baseline: an autoregressive decoder, or LLaDA."
    )
    init: str | None = Field(
        None, description="Directory or hub id of a model to continue from, in the released format."
    )
    vae: dict[str, Any] = Field({}, description="Keys of cola_vae/config.json; the vocabulary is filled in.")
    dit: dict[str, Any] = Field({}, description="Keys of cola_dit/config.json; the channels are filled in.")
    image: dict[str, Any] = Field(
        {},
        description="Keys of cola_image/config.json, of the codec of a model that learns pictures; also"
        " beside an init that has none yet.",
    )
    decoder: dict[str, Any] = Field(
        {},
        description="Baselines: keys of decoder/config.json; without dim, num_layers, num_heads and ffn_dim,"
        " as many parameters as vae and dit together.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.init is not None and (self.vae or self.dit or self.decoder):
            raise ValueError("init gives the configurations: expected no vae, dit and decoder keys beside it")
        return self


class RunSection(Section):
    """How often things happen, in steps (0: never), and on what and how the run computes."""

    log_every: int = Field(20, ge=1, le=MOST_STEPS, description="Steps between lines of metrics.jsonl.")
    validate_every: int = Field(500, ge=0, le=MOST_STEPS, description="Steps between validations.")
    validation_rows: int = Field(
        64, ge=1, le=MOST_ROWS, description="Rows of a validation, the same every time."
    )
    checkpoint_minutes: float | None = Field(
        None, ge=0.01, le=1e5, description="Besides, a checkpoint so many minutes after the last one."
    )
    save_every: int = Field(500, ge=1, le=MOST_STEPS, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, le=10**6, description="Checkpoints kept.")
    keep_every: int = Field(
        0, ge=0, le=MOST_STEPS, description="Checkpoints at multiples of so many steps are kept too."
    )
    sample_every: int = Field(
        1000, ge=0, le=MOST_STEPS, description="Steps between samples, in stages whose model writes."
    )
    sample_prompts: tuple[str, ...] = Field(
        ("Once upon a time",), description="What samples continue, or answer where there are conversations."
    )
    sample_tokens: int = Field(48, ge=1, le=MOST_TOKENS, description="New tokens of a sample.")
    max_skipped: int = Field(
        10,
        ge=0,
        le=MOST_STEPS,
        description="Steps with a non-finite loss or gradient are skipped; more of them end the run.",
    )
    monitors: tuple[str, ...] = Field(
        (), description="Besides metrics.jsonl: tensorboard, or package.module:Class of your own."
    )
    report: bool = Field(True, description="Write report/report.html with plots at the end.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of matrix products; weights, optimiser and latents stay float32."
    )
    save_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="Of the saved model; int8: the matrices of its blocks, by row, else bfloat16."
    )
    compile: bool = Field(False, description="torch.compile each transformer block of the DiT or decoder.")
    checkpoint_activations: bool = Field(
        False,
        description="Compute blocks of the DiT or decoder again in the backward pass.",
    )
    device: str = Field("auto", description="cpu, cuda, or auto: cuda where there is one.")
    shard: bool = Field(
        True, description="Several ranks: shard weights, gradients and optimiser over them (FSDP2)."
    )
    replicas: int = Field(
        1,
        ge=1,
        le=MOST_ROWS,
        description="Hybrid sharding: so many groups of ranks, each holding the model once.",
    )
