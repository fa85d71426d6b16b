"""What a model cost: parameters and training FLOPs, everything counted, so that "matched" can be checked.

Everything: the Text VAE with its embeddings, stage 1 with its masked stream, both copies of a stage-2 row,
the frozen or the reference encoder, heads. Beside it the narrow count, 6 N D: N parameters of the network
that generates latents or tokens (the DiT; the decoder without its embedding), D tokens of its stage.
Papers compare by such a number; that of Cola DLM does not say which it used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colada.train.dry_run import decoder_config_of, plan_run, resolve
from colada.train.recipe import Recipe


@dataclass(frozen=True)
class Ledger:
    """What a run of one recipe costs.

    Attributes:
        arch: "cola", "ar" or "llada".
        parameters: of each network.
        flops: useful ones of the whole run, by stage and part.
        tokens: of all stages.
        narrow_flops: 6 N D, see above.
    """

    arch: str
    parameters: Mapping[str, int]
    flops: Mapping[str, float]
    tokens: int
    narrow_flops: float

    @property
    def total_parameters(self) -> int:
        """Of all networks."""
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> float:
        """Of all stages."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "arch": self.arch,
            "parameters": {**self.parameters, "total": self.total_parameters},
            "flops": {**self.flops, "total": self.total_flops},
            "tokens": self.tokens,
            "narrow_flops": self.narrow_flops,
        }


def ledger(recipe: Recipe) -> Ledger:
    """Return what a run of a recipe costs; nothing is trained or allocated.

    Raises:
        ColadaError: for settings that do not fit each other.
    """
    recipe = resolve(recipe)
    plan, arch = plan_run(recipe, 1), recipe.model.arch
    flops = {
        f"{phase.name}: {part}": phase.steps * value
        for phase in plan.phases
        for part, value in phase.flops.items()
    }
    if arch == "cola":
        network, stages = plan.parameters["DiT"], [own for own in plan.phases if own.name != "stage 1"]
    else:
        config = decoder_config_of(recipe)
        network, stages = config.parameters - config.embeddings * config.dim, list(plan.phases)
    tokens = sum(phase.steps * phase.tokens for phase in stages)
    return Ledger(arch, plan.parameters, flops, plan.tokens, 6.0 * network * tokens)
