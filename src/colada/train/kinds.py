"""The kinds of training that a stage of a recipe can be, each with its settings.

A kind is a section here, one of :data:`AnyStage`, and a class that it names by ``stage``: which networks
learn, what a step draws and minimises, what it costs (:class:`colada.train.stages.Stage`). Nothing here waits
for torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from colada.data.sources import Section
from colada.train.answers import REPLAY, PreferenceTerms, RewardTerms, Weight
from colada.train.picture_terms import CodecTerms, PictureTerms
from colada.train.teaching_terms import Grid, GuidanceTerms, TrajectorySection

MOST_STEPS = 10**9
MOST_ROWS = 2**20
MOST_TOKENS = 2**20  # Of a row.
SMALLEST, LARGEST = 1e-12, 1e6
"""Of numbers that are neither counts nor shares: below and above, float32 has little left to compute with."""

Share = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


class StageSection(Section):
    """A stage: its length, its rows, and its optimiser."""

    archs: ClassVar[tuple[str, ...]]
    """The architectures that it trains: a run leaves out the stages of others."""
    stage: ClassVar[str]
    """``module:Class`` of what it does."""
    formats: ClassVar[tuple[str, ...]] = ("text", "messages", "pairs", "tasks")
    """The formats of the sources that it reads."""
    group: ClassVar[int | None] = None
    """Rows are of single samples, so many together, as pairs of answers are; None: as the data says."""
    first: ClassVar[int] = 1
    """The least number that it has in the seeds of rows and noise, whatever comes before it in the recipe."""

    kind: str = Field("", description="What is trained; unset: what the stage's name says.")
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
    weights: dict[str, Weight] | None = Field(
        None,
        description="Shares of the rows by source, named by path, hub id, or the last part of either without"
        " its ending; sources left out are not read. Unset: all, by their own weights.",
    )
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon orthogonalises the updates of the blocks' matrices (AdamW for the rest),"
        " scaled to AdamW's size, so that both share one learning rate.",
    )
    lr: float = Field(1e-3, ge=SMALLEST, le=LARGEST, description="Highest learning rate, after the warm-up.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="After the warm-up: half a cosine down; wsd: constant, then linear down; or constant.",
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

    @property
    def rows(self) -> int:
        """Rows that a step computes, over all ranks."""
        return self.batch * (self.group or 1)


class TextVAETerms(Section):
    """Weights of the Text VAE's terms where it learns."""

    beta: Weight = Field(1e-3, description="Weight of KL(q || N(0, I)); in joint training, of E log q.")
    mask: Weight = Field(0.5, description="lambda_mask.")
    mask_ratio: Share = Field(0.15, description="Share of the encoder's input tokens masked there.")


class FlowTerms(Section):
    """How flow matching draws its examples."""

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
    space: Literal["velocity", "half", "z0"] = Field(
        "velocity", description="Where errors count: that of the velocity times a to the power 0, 1 or 2."
    )
    self_conditioning: float = Field(
        0.0, ge=0, le=1, description="Share of steps in which the DiT takes its own guess of z0 as an input."
    )
    train: Literal["all", "adaln", "lora"] = Field(
        "all",
        description="What of the DiT learns: all; the matrices of its modulation alone; or, beside each"
        " matrix of its blocks, a product of low rank, which is part of the weights at every step.",
    )
    rank: int = Field(16, ge=1, le=4096, description="lora: of the products. Wants ten times the lr of all.")

    @model_validator(mode="after")
    def _one_optimiser(self) -> FlowTerms:
        if self.train == "lora" and getattr(self, "optimiser", "adamw") != "adamw":
            raise ValueError("train='lora' with optimiser='muon', expected 'adamw': factors are no updates")
        return self


class PriorTerms(FlowTerms):
    """What flow matching of the DiT may do besides."""

    dropout: Share = Field(0.0, description="Share of what the DiT's attention and MLP add that is dropped.")
    adaptive_timesteps: bool = Field(
        False,
        description="Draw more often where the error falls steeply along the timestep law's quantiles, as"
        " the steps before have measured it.",
    )
    consistency: Weight = Field(
        0.0,
        description="Weight of the difference between a guess of z0 and that of the averaged weights a step"
        " further along it; 0: none. For few steps; needs ema.",
    )
    consistency_steps: int = Field(16, ge=2, le=1000, description="Equal steps of which that is one.")
    consistency_ramp: float = Field(
        0.04, ge=0, le=1, description="Share of the stage's steps in which its weight rises from 0."
    )

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if self.consistency and not getattr(self, "ema", 0):
            raise ValueError(f"consistency={self.consistency:g} with ema=0, expected averaged weights")
        return self


class TextVAESection(TextVAETerms, StageSection):
    """The Text VAE alone: -log p(x|z0) + beta KL + lambda_mask L_mask."""

    archs = ("cola",)
    stage = "colada.train.cola:TextVAEStage"
    kind: Literal["vae"] = "vae"
    decoder_only: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps, the last ones, in which the encoder is frozen and the decoder learns"
        " -log p(x|z0) alone.",
    )

    @property
    def whole_steps(self) -> int:
        """How many of the steps encoder and decoder learn in together."""
        return self.steps - round(self.decoder_only * self.steps)


class FlowSection(PriorTerms, StageSection):
    """The flow of data by the DiT, on the latents of a frozen Text VAE."""

    archs = ("cola",)
    stage = "colada.train.cola:PriorStage"
    first = 2


class PriorSection(FlowSection):
    """The DiT by flow matching, on the latents of a frozen Text VAE."""

    kind: Literal["prior"] = "prior"


class InstructSection(FlowSection):
    """The DiT by flow matching on answers, their prompts clean before them, and on text of before."""

    kind: Literal["instruct"] = "instruct"
    lr: float = Field(2e-4, ge=SMALLEST, le=LARGEST, description="Highest learning rate, after the warm-up.")
    warmup: int = Field(50, ge=0, le=MOST_STEPS, description="Steps over which the learning rate rises.")
    ema: float = Field(
        0.99, ge=0, lt=1, description="Decay of the averaged weights, which are the ones saved; 0: none."
    )
    history_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Probability with which a block of an answer sees neither prompt nor answer before it:"
        " guidance is then away from what any answer may be.",
    )
    replay: Share = Field(
        0.25,
        description="Share of rows of the sources of plain text, so that what was learnt before stays;"
        " without such sources, or without others, all rows are of what there is.",
    )


class JointSection(TextVAETerms, PriorTerms, StageSection):
    """The DiT by flow matching, and the Text VAE along with it."""

    archs = ("cola",)
    stage = "colada.train.cola:JointStage"
    first = 2
    kind: Literal["joint"] = "joint"
    interval: tuple[Steps, Steps] | None = Field(
        None, description="So many steps joint, so many with a frozen Text VAE, and again; unset: all joint."
    )
    vae_lr: Weight = Field(1.0, description="The Text VAE's learning rate, as a factor on lr.")
    lambda_vae: Weight = Field(1.0, description="Weight of the Text VAE's terms.")
    lambda_fm: Weight = Field(1.0, description="Weight of the flow.")
    lambda_ref: Weight = Field(0.1, description="Weight of KL(q || q as the stage began).")

    @property
    def joint_steps(self) -> int:
        """How many of the steps the Text VAE learns in."""
        if self.interval is None:
            return self.steps
        joint, whole = self.interval[0], sum(self.interval)
        return self.steps // whole * joint + min(self.steps % whole, joint)

    def joint_at(self, step: int) -> bool:
        """Return whether the Text VAE learns in a step."""
        return self.interval is None or step % sum(self.interval) < self.interval[0]


class TaughtSection(GuidanceTerms, FlowTerms, StageSection):
    """What learns from a frozen, guided teacher."""

    archs = ("cola",)
    first = 2
    teacher: str | None = Field(
        None,
        description="A model; same: that of the stage with a teacher before it; unset: the weights as the"
        " stage begins.",
    )
    history_dropout: float = Field(0.0, ge=0, le=0, description="None: nothing unconditional is learnt.")
    trajectories: TrajectorySection | None = Field(
        None, description="Take states, and where they lead, from trajectories of the teacher that are kept."
    )


class DistilSection(TaughtSection):
    """The DiT learns what a guided teacher, its own first weights, comes to; it then needs no guidance."""

    stage = "colada.train.distil:DistilStage"
    kind: Literal["distil"] = "distil"
    grids: tuple[Grid, ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Values of a from 1 to 0: the student makes a step of each interval. Several, for a"
        " student of several numbers of steps, need landing_time. Unset: it learns the guided velocity at any"
        " a, and any solver goes on with it.",
    )
    shares: tuple[Weight, ...] | None = Field(None, description="Of the grids in the blocks; unset: equal.")
    landing_time: bool = Field(False, description="The student is told where a step ends.")
    teacher_steps: int = Field(
        16,
        ge=1,
        le=1024,
        description="The teacher's steps from noise to data, over a grid's intervals alike.",
    )
    trajectory: float = Field(
        0.5, ge=0, le=1, description="Share of steps whose states are the teacher's own; else noisy data."
    )
    rollout: int = Field(4, ge=1, le=64, description="The teacher's steps from noise to such a state.")

    @model_validator(mode="after")
    def _fits(self) -> DistilSection:
        count = len(self.grids or ())
        if count > 1 and not self.landing_time:
            raise ValueError(f"{count} grids without landing_time, expected one grid or landing_time: true")
        if self.landing_time and not count:
            raise ValueError("landing_time without grids, expected where steps end")
        if self.landing_time and self.train == "lora":
            raise ValueError(
                "landing_time with train='lora', expected 'all' or 'adaln': it is no matrix of a block"
            )
        if self.shares is not None and (len(self.shares) != count or not any(self.shares)):
            raise ValueError(f"shares {list(self.shares)}, expected one a grid, some above 0")
        if self.trajectories is not None:
            missing = [
                a for grid in self.grids or ((-1.0,),) for a in grid if a not in self.trajectories.grid
            ]
            if missing:
                reason = "no grids" if self.grids is None else f"{missing[0]} in a grid"
                known = f"values of trajectories.grid {list(self.trajectories.grid)}"
                raise ValueError(f"{reason}, expected {known}")
        return self


class SolverSection(TaughtSection):
    """A solver of few evaluations learns to end where a teacher's many do; no network learns."""

    stage = "colada.train.solver:SolverStage"
    kind: Literal["solver"] = "solver"
    evaluations: int = Field(6, ge=1, le=64, description="A block's: N of them are N (N + 5) / 2 numbers.")
    steps: int = Field(300, ge=0, le=MOST_STEPS, description="Optimiser steps; 0 leaves the stage out.")
    batch: int = Field(8, ge=1, le=MOST_ROWS, description="Rows per step, over all ranks.")
    lr: float = Field(1e-2, ge=SMALLEST, le=LARGEST, description="Highest learning rate.")
    warmup: int = Field(10, ge=0, le=MOST_STEPS, description="Steps over which it rises.")

    trajectories: TrajectorySection = Field(
        TrajectorySection(), description="Trajectories of the teacher that are kept: their ends are the goal."
    )


class PicturesSection(PictureTerms, PriorTerms, StageSection):
    """The DiT by flow matching, of text, of pictures after captions, and of answers about pictures.

    A step has one of these tasks; the rows of one of text are as a prior's.
    """

    archs = ("cola",)
    stage = "colada.train.pictures:PicturesStage"
    first = 2
    kind: Literal["pictures"] = "pictures"
    train: Literal["all", "pictures", "adaln", "lora"] = Field(  # type: ignore[assignment]
        "all",
        description="What of the DiT learns: all; what text alone does not use, so that text stays as it was"
        " to the bit; the matrices of its modulation; or, beside each of its blocks' matrices, a product of"
        " low rank.",
    )
    adaptive_timesteps: Literal[False] = Field(False, description="Tasks have a law of their own each.")

    @model_validator(mode="after")
    def _learns(self) -> PicturesSection:
        if self.train == "pictures" and self.tasks.get("text"):
            raise ValueError(
                "train='pictures' with steps of text, expected no share of tasks.text: text stays"
            )
        return self

    @property
    def learns_captions(self) -> bool:
        """Whether captions are learnt beside what is drawn from them."""
        return self.caption_weight > 0 and self.train != "pictures"


class PictureVAESection(CodecTerms, StageSection):
    """A convolutional picture codec alone: square error + kl KL(q || N(0, I)); its rows are of pictures."""

    archs = ("cola",)
    stage = "colada.train.pictures:PictureVAEStage"
    kind: Literal["picture_vae"] = "picture_vae"


class AnswersSection(FlowTerms, StageSection):
    """The DiT learns from answers to prompts."""

    archs = ("cola",)
    first = 2
    prefix_share: float = Field(0.0, ge=0, le=0, description="None: prompts are what is clean.")
    space: Literal["velocity"] = Field("velocity", description="Where errors count.")
    self_conditioning: float = Field(0.0, ge=0, le=0, description="None: no guess is an input.")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST, description="On matrices only.")
    clip: float = Field(0.5, ge=SMALLEST, le=LARGEST, description="Largest norm of the gradient.")


class PreferencesSection(PreferenceTerms, AnswersSection):
    """The DiT prefers one answer to another (Flow-DPO): batch counts pairs."""

    stage = "colada.train.preferences:PreferencesStage"
    formats = ("preferences",)
    group = 2
    kind: Literal["preferences"] = "preferences"
    batch: int = Field(16, ge=1, le=MOST_ROWS, description="Pairs per step, over all ranks.")
    copies: int = Field(4, ge=1, le=1024, description="Noisy copies of each row, which share one clean copy.")
    lr: float = Field(3e-5, ge=SMALLEST, le=LARGEST, description="Highest learning rate, after the warm-up.")


class RolloutSection(RewardTerms, AnswersSection):
    """The DiT learns from answers of its own: batch counts answers."""

    formats = ("messages", "pairs", "tasks")
    group = 1
    copies: int = Field(2, ge=1, le=1024, description="Noisy copies of each row, which share one clean copy.")
    lr: float = Field(5e-5, ge=SMALLEST, le=LARGEST, description="Highest learning rate, after the warm-up.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "wsd",
        description="After the warm-up: half a cosine down; wsd: constant, then linear down; or constant.",
    )

    @property
    def rows(self) -> int:
        """Rows that a step computes, over all ranks: answers, and those of the data."""
        return self.batch + -(-self.batch // REPLAY)


class RewardSection(RolloutSection):
    """The DiT learns by rewards of what it writes (DiffusionNFT)."""

    stage = "colada.train.rewards:RewardStage"
    kind: Literal["reward"] = "reward"
    beta: float = Field(1.0, ge=SMALLEST, le=LARGEST, description="How far good and bad lie from the old.")
    least_spread: float = Field(
        0.1, ge=SMALLEST, le=LARGEST, description="Deviation of a group's rewards that counts as full, least."
    )
    adaptive: bool = Field(True, description="Divide each error by its own mean size.")
    credit: Literal["answer", "until_met"] = Field(
        "answer",
        description="What of an answer its reward is credited to: all; or its blocks up to the one that met"
        " the rule, after which no block has changed the reward. The others are held where they are.",
    )

    keep: Share = Field(0.5, description="How much of the old weights stays as answers are renewed, at most.")
    keep_rise: Weight = Field(0.001, description="And by how much more with each round, from 0.")

    @model_validator(mode="after")
    def _credits(self) -> RewardSection:
        if self.credit == "until_met" and self.judge is not None:
            raise ValueError("credit='until_met' with a judge, which reads all blocks: expected 'answer'")
        return self


class RaftSection(RolloutSection):
    """The DiT learns the best answer of each group, if it is good: what rewards must beat."""

    stage = "colada.train.rewards:RaftStage"
    kind: Literal["raft"] = "raft"
    margin: Weight = Field(
        0.5, description="Deviations by which the best is above its group's mean, to be learnt."
    )


class DecoderSection(StageSection):
    """A baseline (model.arch ar or llada). Keys left out are as in the last of Cola DLM's stages."""

    archs = ("ar", "llada")
    stage = "colada.train.decoder:DecoderStage"
    kind: Literal["decoder"] = "decoder"
    steps: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="Optimiser steps; 0: as many as take the FLOPs of Cola DLM's stages.",
    )
    llada_lr: float | None = Field(
        None,
        ge=SMALLEST,
        le=LARGEST,
        description="llada: highest learning rate, if it wants another than lr.",
    )
    random_length: float = Field(0.01, ge=0, le=1, description="llada: share of rows cut to a random length.")
    generation: dict[str, Any] = Field(
        {}, description="Settings stored with the baseline, in place of those under generation."
    )


AnyStage = Annotated[
    TextVAESection
    | PriorSection
    | InstructSection
    | JointSection
    | DistilSection
    | SolverSection
    | PicturesSection
    | PictureVAESection
    | PreferencesSection
    | RewardSection
    | RaftSection
    | DecoderSection,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[StageSection]] = {
    section.model_fields["kind"].default: section for section in get_args(get_args(AnyStage)[0])
}
"""The section of each kind."""
