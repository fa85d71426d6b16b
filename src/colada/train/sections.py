"""The sections of a recipe: every key with its default, its bounds and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from colada.data.sources import Section, Source

MOST_STEPS = 10**9
MOST_ROWS = 2**20
MOST_TOKENS = 2**20  # Of a row.
SMALLEST, LARGEST = 1e-12, 1e6
"""Of numbers that are neither counts nor shares: below and above, float32 has little left to compute with."""

Share = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


class DataSection(Section):
    """Where the text is and how it becomes rows."""

    sources: tuple[Source, ...] = Field(
        (Source(path="data"),),
        min_length=1,
        description="Where the text is; several are mixed by weight.",
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
        None, description="Jinja file for conversations; unset: ChatML, or that of model.init."
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
        return any(source.format == "messages" for source in self.sources)


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


class OptimiserSection(Section):
    """Length of a stage, its rows, and its optimiser."""

    steps: int = Field(1000, ge=0, le=MOST_STEPS, description="Optimiser steps; 0 leaves the stage out.")
    batch: int = Field(32, ge=1, le=MOST_ROWS, description="Rows per step, over all ranks.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=MOST_ROWS,
        description="Rows per pass on each rank; gradients are accumulated. Unset: all at once.",
    )
    length: int = Field(
        128,
        ge=1,
        le=MOST_TOKENS,
        description="Tokens per row; for Cola DLM a multiple of patch_size * block_size.",
    )
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon orthogonalises the updates of the blocks' matrices (AdamW for the rest),"
        " scaled to AdamW's size, so that both share one learning rate.",
    )
    lr: float = Field(1e-3, ge=SMALLEST, le=LARGEST, description="Highest learning rate, after the warm-up.")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="After the warm-up: half a cosine down; wsd: constant, then linear down."
    )
    final_lr: float = Field(0.05, ge=0, le=1, description="Share of lr that is left at the last step.")
    warmup: int = Field(100, ge=0, le=MOST_STEPS, description="Steps over which the learning rate rises.")
    decay: float = Field(0.2, ge=SMALLEST, le=1, description="Share of the steps in which wsd goes down.")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's decay rates.")
    weight_decay: float = Field(0.01, ge=0, le=LARGEST, description="On matrices only.")
    clip: float = Field(1.0, ge=SMALLEST, le=LARGEST, description="Largest norm of the gradient.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the averaged weights, which are the ones saved; 0: none."
    )


class Stage1Section(OptimiserSection):
    """The Text VAE alone: -log p(x|z0) + beta KL + lambda_mask L_mask."""

    beta: float = Field(
        1e-3, ge=0, le=LARGEST, description="Weight of KL(q || N(0, I)); in joint training, of E log q."
    )
    mask: float = Field(0.5, ge=0, le=LARGEST, description="lambda_mask, in joint training too.")
    mask_ratio: float = Field(
        0.15, ge=0, lt=1, description="Share of the encoder's input tokens masked there."
    )
    log_snr: float | None = Field(
        None, ge=-50, le=50, description="Fix log(E mu^2 / E sigma^2); unset: learnt."
    )


class Stage2Section(OptimiserSection):
    """The DiT, with the Text VAE frozen or trained along."""

    vae: Literal["frozen", "joint", "interval"] = Field(
        "frozen", description="Whether the Text VAE learns too: never, always, or in intervals."
    )
    interval: tuple[Steps, Steps] = Field(
        (100, 900), description="vae: interval: so many steps joint, so many frozen, and again."
    )
    vae_lr: float = Field(
        1.0, ge=0, le=LARGEST, description="The Text VAE's learning rate, as a factor on lr."
    )
    copies: int = Field(1, ge=1, le=1024, description="Noisy copies of each row, which share one clean copy.")
    loc: float | None = Field(
        None,
        ge=-100,
        le=100,
        description="Centre of the timestep law t = T sigmoid(n), n ~ N(loc, scale^2); unset: by width.",
    )
    scale: float = Field(1.0, ge=SMALLEST, le=100, description="Spread of the timestep law.")
    timestep_per: Literal["block", "row"] = Field("block", description="What draws a timestep of its own.")
    prefix_share: float = Field(
        0.05, ge=0, le=1, description="Share of blocks with a clean prefix inside, as at the end of a prompt."
    )
    history_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability with which a noisy block sees nothing before it: trains the unconditional"
        " branch of guidance in the middle of texts.",
    )
    lambda_vae: float = Field(1.0, ge=0, le=LARGEST, description="Joint: weight of the Text VAE's terms.")
    lambda_fm: float = Field(1.0, ge=0, le=LARGEST, description="Joint: weight of the flow.")
    lambda_ref: float = Field(0.1, ge=0, le=LARGEST, description="Joint: weight of KL(q || q of stage 1).")

    @property
    def joint_steps(self) -> int:
        """How many of the steps the Text VAE learns in."""
        if self.vae != "interval":
            return self.steps if self.vae == "joint" else 0
        joint, whole = self.interval[0], sum(self.interval)
        return self.steps // whole * joint + min(self.steps % whole, joint)

    def joint_at(self, step: int) -> bool:
        """Return whether the Text VAE learns in a step."""
        return self.vae == "joint" or (
            self.vae == "interval" and step % sum(self.interval) < self.interval[0]
        )


class BaselineSection(OptimiserSection):
    """A baseline's only stage: model.arch ar or llada, on the same data. Keys left out are as in stage2."""

    steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="Optimiser steps; 0: as many as take the FLOPs of stage1 and stage2.",
    )
    llada_lr: float | None = Field(
        None,
        ge=SMALLEST,
        le=LARGEST,
        description="llada: highest learning rate, if it wants another than lr.",
    )
    generation: dict[str, Any] = Field(
        {}, description="Settings stored with the baseline, in place of those under generation."
    )
    random_length: float = Field(0.01, ge=0, le=1, description="llada: share of rows cut to a random length.")


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
        1000, ge=0, le=MOST_STEPS, description="Steps between samples, in the last stage."
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
    save_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the saved model.")
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
