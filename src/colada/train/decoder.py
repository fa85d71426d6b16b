"""A baseline in a run: one network, one stage, on the same rows as Cola DLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.models.base import LanguageModel
from colada.models.decoder import DecoderLM
from colada.models.load_decoder import MODELS
from colada.networks.decoder import Decoder
from colada.text.tokenizer import Tokenizer
from colada.train.decoder_losses import MaskDraws, count, decoder_loss, draw_masks
from colada.train.decoder_plan import decoder_flops
from colada.train.losses import Loss
from colada.train.noise import Counts
from colada.train.optimisation import make_optimisers
from colada.train.parallel import compile_blocks
from colada.train.parallel import recompute as recompute_blocks
from colada.train.recipe import Recipe
from colada.train.stages import LayOut, Stage, System, copied, drawn, row_generator


class DecoderStage(Stage):
    """The only stage of a baseline."""

    def __init__(self, recipe: Recipe, decoder: Decoder) -> None:
        self.decoder = decoder
        optimisers = make_optimisers(decoder, recipe.baseline, recipe.baseline.lr)
        super().__init__(1, recipe, nn.ModuleDict({"decoder": decoder}), optimisers, {})

    def draw(self, rows: Sequence[int]) -> MaskDraws:
        """Return what the loss of rows with these numbers draws: masks for LLaDA, nothing for AR."""
        if self.decoder.config.objective == "ar":
            return MaskDraws()
        generators = [row_generator(self.recipe.seed, self.number, row) for row in rows]
        return draw_masks(generators, self.section.length, self.recipe.baseline.random_length)

    def count(self, rows: Batch, draws: MaskDraws) -> Counts:
        """Return a batch's share in the counts of its step."""
        return count(rows, draws)

    def loss(self, networks: nn.ModuleDict, rows: Batch, draws: MaskDraws, counts: Counts, step: int) -> Loss:
        """Return the loss of rows in a step, with the network that learns or its average."""
        decoder = networks["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder_loss(decoder, rows, draws, counts)

    def flops(self, step: int) -> float:
        """Return the useful FLOPs of a step."""
        section = self.section
        return sum(decoder_flops(self.decoder.config, section.batch, section.length).values())


class DecoderSystem(System):
    """A decoder, a new one or that of a baseline to continue from.

    Raises:
        ColadaError: if it does not fit the recipe.
    """

    numbers = (1,)
    block_tokens = 1

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, start: LanguageModel | None, whole: bool = True
    ) -> None:
        super().__init__(recipe, whole)
        if start is None:
            config = recipe.decoder_config(tokenizer.vocab_size, tokenizer.end_ids[0])
        else:
            if not isinstance(start, DecoderLM) or start.arch != recipe.model.arch:
                wanted = recipe.model.arch
                raise ColadaError(f"model.init={recipe.model.init} is {start.arch}, model.arch is {wanted!r}")
            config = start.decoder.config
            if start.vocab_size != tokenizer.vocab_size:
                raise ColadaError(
                    f"model.init={recipe.model.init} has vocab_size={start.vocab_size}, "
                    f"the tokenizer {tokenizer.vocab_size}"
                )
        self.decoder = self._made(lambda: Decoder(config))
        first = drawn(self.decoder, row_generator(recipe.seed, 0, 2))
        if isinstance(start, DecoderLM):
            first = copied(start.decoder)
        self._begin({"decoder": self.decoder}, {"decoder": first})

    def prepare(self, lay_out: LayOut, recompute: bool, compiled: bool) -> None:
        """Lay out the decoder."""
        if recompute:
            recompute_blocks(self.decoder)
        if compiled:
            compile_blocks(self.decoder)
        self._laid_out("decoder", lay_out)

    def stage(self, number: int, lay_out: LayOut) -> DecoderStage:
        """Return the stage."""
        return DecoderStage(self.recipe, self.decoder)

    def model(self, networks: Mapping[str, nn.Module], **parts: Any) -> DecoderLM:
        """Return the network as a model."""
        decoder = networks["decoder"]
        assert isinstance(decoder, Decoder)
        return MODELS[decoder.config.objective](decoder, **parts)
