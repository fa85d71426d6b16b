"""A baseline in a run: one network, and its kind of stage, on the same rows as Cola DLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.decoder import DecoderLM
from colada.models.load import MODELS
from colada.networks.decoder import Decoder
from colada.randomness import generator_of
from colada.text.tokenizer import Tokenizer
from colada.train.cost import Phase, Placement, decoder_phase
from colada.train.decoder_losses import MaskNoise, count, decoder_loss, draw_masks
from colada.train.kinds import DecoderSection
from colada.train.losses import Loss
from colada.train.noise import Counts
from colada.train.recipe import Recipe
from colada.train.stages import Configs, Stage, System, copied, drawn, network_of


class DecoderSystem(System):
    """A decoder, a new one or that of a baseline to continue from.

    Raises:
        ColadaError: if it does not fit the recipe.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None, whole: bool = True
    ) -> None:
        super().__init__(recipe, tokenizer.pad_id, whole)
        if start is None:
            config = recipe.decoder_config(tokenizer.vocab_size, tokenizer.end_ids[0])
        else:
            if not isinstance(start, DecoderLM) or start.arch != recipe.model.arch:
                arch = recipe.model.arch
                raise ColadaError(f"model.init={recipe.model.init} is {start.arch}, model.arch is {arch!r}")
            config = start.decoder.config
            if start.vocab_size != tokenizer.vocab_size:
                raise ColadaError(
                    f"model.init={recipe.model.init} has vocab_size={start.vocab_size}, "
                    f"the tokenizer {tokenizer.vocab_size}"
                )
        decoder = self.made(lambda: Decoder(config))
        first = drawn(decoder, generator_of(recipe.seed, 0, 2))
        if isinstance(start, DecoderLM):
            first = copied(start.decoder)
        self._begin({"decoder": decoder}, {"decoder": first})

    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> DecoderLM:
        """Return the network as a model."""
        decoder = network_of(networks, "decoder", Decoder)
        return MODELS[decoder.config.objective](decoder, **parts)


class DecoderStage(Stage):
    """Next tokens, or masked ones."""

    learns = ("decoder",)
    section: DecoderSection

    def draw(self, rows: Sequence[int]) -> MaskNoise:
        """Return what the loss of rows with these numbers draws: masks for LLaDA, nothing for AR."""
        if self.recipe.model.arch == "ar":
            return MaskNoise()
        return draw_masks(self.generators(rows), self.section.length, self.section.random_length)

    def count(self, rows: Batch, noise: MaskNoise) -> Counts:
        return count(rows, noise)

    def loss(self, networks: nn.ModuleDict, rows: Batch, noise: MaskNoise, counts: Counts, step: int) -> Loss:
        return decoder_loss(network_of(networks, "decoder", Decoder), rows, noise, counts)

    @classmethod
    def phases(
        cls, recipe: Recipe, name: str, section: Any, configs: Configs, placement: Placement
    ) -> list[Phase]:
        return [decoder_phase(configs["decoder"], name, section, placement)]
