"""What stages that learn from answers are told: preferences between two, or rewards of what is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from colada.data.instructions import ON_STORIES, check_tasks
from colada.data.rules import imported
from colada.data.sources import Section
from colada.generate.settings import check_settings

Weight = Annotated[float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**20)]
SAMPLER = {"steps": 8, "solver": "ab2", "schedule": "front-loaded", "guidance": 1.0}
"""How rollouts are written: without guidance, as what is learnt is the model's own field."""
REPLAY = 4
"""In a step, one row of the data comes with so many answers."""


class PreferenceTerms(Section):
    """Of Flow-DPO."""

    beta: Weight | None = Field(
        None,
        description="How sharply answers are told apart. Unset: 2 / the deviation of what the first steps,"
        " which have the anchor alone, have gained on pairs.",
    )
    calibration: int = Field(50, ge=2, le=2**20, description="How many first steps set beta.")
    anchor: Weight = Field(0.3, description="Weight of the chosen answers' own flow error.")
    latents: Literal["sample", "mean"] = Field(
        "sample",
        description="Of the answers: drawn from the Text VAE's posterior, as what the model writes is; or its"
        " means.",
    )
    reference: Literal["recomputed", "stored"] = Field(
        "recomputed",
        description="Errors of the first weights: of a frozen copy in every step; or stored before the first"
        " step, of all pairs that are to come, which needs no copy (and validates no preferences).",
    )


class RewardTerms(Section):
    """Of stages that learn from rewards of what the model writes."""

    reward: str = Field(
        "all", description="A task of colada.data.instructions, all of them, or package.module:function."
    )
    questions: str | None = Field(None, description="File of questions, for the task story_questions.")
    prompts: Count = Field(32, description="Prompts of a round, over all ranks.")
    samples: int = Field(8, ge=2, le=1024, description="Answers to each prompt.")
    updates: Count = Field(32, description="Steps of a round: they learn from the same answers.")
    new_tokens: Count = Field(32, description="Tokens of an answer at most.")
    unended: Weight = Field(
        0.3, description="What the reward of an answer is less by that does not end by itself within these."
    )
    judge: str | None = Field(
        None,
        description="A model that reads the answers, without prompt and end, so that rewards are not earned"
        " by worse language.",
    )
    judge_weight: Weight = Field(
        0.1, description="What the reward of an answer is less by for each nat a token under the judge."
    )
    sampler: dict[str, Any] = Field(
        SAMPLER, description="Generation settings of the answers; what is left out is as here."
    )
    latents: Literal["written", "encoded"] = Field(
        "written",
        description="Of the answers: as the model came to them; or their texts' own, of the Text VAE's"
        " posterior.",
    )
    pull: Weight = Field(0.05, description="Weight of the distance to the first weights, on answers.")
    replay: Weight = Field(
        0.2, description="Weight of rows of the data, a quarter as many as of answers, in every step."
    )
    replay_of: Literal["reference", "data"] = Field(
        "reference",
        description="What holds on those rows: the first weights, in which guidance may be folded; or the"
        " data's flow, where it is not.",
    )

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if ":" in self.reward:
            imported(self.reward)
        elif self.reward != "all":
            check_tasks([self.reward], self.questions)
        if self.questions is not None and self.reward != ON_STORIES:
            raise ValueError(
                f"questions={self.questions!r} with reward={self.reward!r}, expected {ON_STORIES!r}"
            )
        return self

    @field_validator("sampler")
    @classmethod
    def _settings(cls, sampler: dict[str, Any]) -> dict[str, Any]:
        check_settings(sampler, "sampler")
        return {**SAMPLER, **sampler}
