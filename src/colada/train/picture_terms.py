"""What stages that learn pictures are told: which tasks, and how their examples are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from colada.data.sources import Section
from colada.train.answers import Weight


class PictureTerms(Section):
    """Of text and pictures in one prior."""

    tasks: dict[Literal["text", "draw", "describe"], Weight] = Field(
        {"text": 0.3, "draw": 0.4, "describe": 0.3},
        description="Shares of the steps: of text alone, of drawing captions, of describing pictures.",
    )
    pairs: int = Field(
        4, ge=1, le=4096, description="Pictures in place of each row, in steps that draw or describe."
    )
    picture_loc: float = Field(2.2, ge=-100, le=100, description="loc of the timestep law of pictures.")
    picture_scale: float = Field(1.0, ge=1e-12, le=100, description="Its scale.")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of pictures that do not see their captions, for guidance."
    )
    caption_weight: Weight = Field(
        1.0, description="Weight of the flow of captions, which are learnt beside what is drawn from them."
    )
    caption_length: int = Field(
        64,
        ge=1,
        le=1024,
        description="Tokens of a caption or an answer; the rest of longer ones is left out.",
    )
    prompts: tuple[str, ...] = Field(
        ("", "what is in the picture?"), min_length=1, description="What answers may follow, one drawn each."
    )
    axial: bool = Field(
        True,
        description="Rotary positions tell rows and columns of a picture's latents; as what follows, of a DiT"
        " that has no pictures yet.",
    )
    dual_layers: int = Field(
        0, ge=0, le=1000, description="First layers of the DiT that get weights of their own for pictures."
    )

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: dict[str, float]) -> dict[str, float]:
        if not sum(tasks.values()):
            raise ValueError("expected a share above 0")
        return tasks


class CodecTerms(Section):
    """Of a picture VAE."""

    pairs: int = Field(1, ge=1, le=4096, description="Pictures of a row.")
    kl: Weight = Field(1e-6, description="Weight of the divergence.")
