"""What networks cost to train: parameters, FLOPs and bytes, counted without training or memory.

FLOPs are the *useful* ones, those that the mathematics of a step asks for. With a
multiply-add as two FLOPs:

- a matrix costs 2 * positions * inputs * outputs; that of an embedding look-up, none;
- attention costs 4 * heads * head_dim * (visible query-key pairs) a layer: scores, then values;
- a network that learns costs 3 * its forward pass (the backward pass is 2 *), a frozen one 1 *;
- the AdaLN matrices and the timestep MLP count once per *distinct* timestep, not per position;
- norms, activations, softmax and rotary positions are not counted, and neither is what does no
  useful work: recomputed activations, invisible pairs, padding.

Rows count as full and as one sample each; with several samples a row, which do not see each other,
the attention terms are upper bounds. MFU = useful FLOPs per second / (ranks * peak FLOPs per second).

Counted by :func:`training_flops`, :func:`memory_per_rank` (Cola DLM), :func:`decoder_flops` and
:func:`decoder_memory` (a baseline), from :func:`networks`, :func:`matrix_entries`, :func:`adaln_entries`,
:func:`block_causal_pairs` and :func:`two_copy_pairs`; measured against what a device could do by
:mod:`colada.train.peak`, and shown by :func:`scaled`. What a whole run costs is in :mod:`colada.train.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from colada.device import parameters_of, unallocated
from colada.errors import ColadaError
from colada.networks.config import DecoderConfig, DiTConfig, TextVAEConfig
from colada.networks.decoder import Decoder
from colada.networks.dit import AdaLN, DiT, DualBlock
from colada.networks.vae import TextVAE
from colada.train.lora import factor_entries, learning, learning_entries

if TYPE_CHECKING:  # It needs what only training does.
    from colada.train.kinds import StageSection


@dataclass(frozen=True)
class Work:
    """What one optimiser step of Cola DLM computes.

    Attributes:
        learns: "vae", the Text VAE; "decoder", its decoder; "dit", the DiT over a frozen Text VAE; or "both".
        rows: of the step, over all ranks.
        length: tokens of a row, a multiple of ``patch_size * block_size``.
        copies: noisy copies of each row, which share one clean copy, where the DiT learns.
        masked: L_mask has a weight; only looked at where the Text VAE learns.
        prefixes: share of the rows encoded once more, for clean prefixes inside blocks.
        per_block: a timestep for each block of each noisy copy, else one for each copy.
        guesses: share of steps in which the DiT first guesses z0 for itself.
        consistency: the DiT's average guesses z0 a step further.
        dropout: what attention and MLP of the DiT add has dropout, of which the masks are kept.
    """

    learns: Literal["vae", "decoder", "dit", "both"]
    rows: int
    length: int
    copies: int = 1
    masked: bool = True
    prefixes: float = 0.0
    per_block: bool = True
    guesses: float = 0.0
    consistency: bool = False
    dropout: bool = False

    @property
    def vae_learns(self) -> bool:
        """Whether the Text VAE learns."""
        return self.learns != "dit"

    @property
    def dit_learns(self) -> bool:
        """Whether the DiT learns."""
        return self.learns in ("dit", "both")

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.rows * self.length

    def blocks(self, vae: TextVAEConfig) -> int:
        """Return the blocks of a row; raises :class:`ColadaError` if it does not divide into them."""
        if self.length % vae.block_tokens:
            raise ColadaError(
                f"work: length={self.length}, expected a multiple of "
                f"patch_size * block_size = {vae.block_tokens}"
            )
        return self.length // vae.block_tokens


@lru_cache(maxsize=4)
def networks(vae: TextVAEConfig, dit: DiTConfig) -> tuple[TextVAE, DiT]:
    """Return both networks, without memory."""
    with unallocated():
        return TextVAE(vae), DiT(dit)


@lru_cache(maxsize=4)
def decoder_network(config: DecoderConfig) -> Decoder:
    """Return a baseline's network, without memory."""
    with unallocated():
        return Decoder(config)


def parameter_counts(vae: TextVAEConfig, dit: DiTConfig) -> dict[str, int]:
    """Return the parameters of each network, which are not allocated."""
    text, prior = networks(vae, dit)
    return {"Text VAE": parameters_of(text), "DiT": parameters_of(prior)}


# --- FLOPs -------------------------------------------------------------------------------------


def block_causal_pairs(blocks: int, block_size: int) -> int:
    """Return the visible pairs of a clean row of n blocks of s: s^2 n (n + 1) / 2."""
    return block_size**2 * blocks * (blocks + 1) // 2


def two_copy_pairs(blocks: int, block_size: int, copies: int = 1) -> int:
    """Return the visible pairs of ``[clean | noisy 1 | ... | noisy m]``: s^2 (n (n - 1) + m n (n + 1)) / 2.

    The clean copy, without its last block, is block-causal; block b of a noisy copy sees the b clean
    blocks before it and itself.
    """
    clean = block_causal_pairs(blocks - 1, block_size)
    return clean + copies * block_causal_pairs(blocks, block_size)


def matrix_entries(module: nn.Module) -> int:
    """Return the entries of the matrices that every position is multiplied by; an embedding is none."""
    products = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    return sum(product.weight.numel() for product in products)


def encoder_flops(config: TextVAEConfig, text: TextVAE, blocks: int) -> int:
    """Return the FLOPs of encoding a row of so many blocks."""
    products = 2 * blocks * config.block_size * matrix_entries(text.encoder)
    pairs = block_causal_pairs(blocks, config.block_size)
    return products + config.encoder_num_blocks * 4 * config.dim * pairs


def prior_flops(prior: DiT, positions: int, pairs: int) -> int:
    """Return the FLOPs of the DiT's pass over a row, by its positions and visible pairs; without AdaLN."""
    config = prior.config
    attention = 4 * config.num_layers * config.heads * config.head_dim * pairs
    return 2 * positions * position_entries(prior) + attention


def training_flops(vae: TextVAEConfig, dit: DiTConfig, work: Work) -> dict[str, float]:
    """Return the useful FLOPs of a step by part; they add up to the step's.

    With n blocks of s latents a row, M = n s latents of P tokens, m noisy copies, and W the matrix
    entries of a part, a row's forward pass costs

    - encoder, decoder: 2 M W + 4 layers dim s^2 n (n + 1) / 2
    - head: 2 M P dim V
    - DiT: 2 (M - s + m M) W + 4 layers heads head_dim s^2 (n (n - 1) + m n (n + 1)) / 2
    - AdaLN: 2 (m n) W, and once in a step for the t = 0 of clean copies

    In the DiT, s and M are numbers of its own positions, ``patch_size`` latents each. What learns
    counts three times: encoder, decoder and head of the Text VAE, with the masked stream once more; DiT and
    AdaLN. A frozen encoder, the reference encoder beside a Text VAE that learns along, the encoding of
    prefixes, the DiT's first guesses and those of its average for consistency count once.

    Raises:
        ColadaError: if a row is not a whole number of blocks.
    """
    text, prior = networks(vae, dit)
    blocks = work.blocks(vae)
    latents = blocks * vae.block_size
    attention = 4 * vae.dim * block_causal_pairs(blocks, vae.block_size)
    head_entries = matrix_entries(text.decoder.final_layer)
    decoder_entries = matrix_entries(text.decoder) - head_entries
    encoder = work.rows * encoder_flops(vae, text, blocks)
    decoder = work.rows * (2 * latents * decoder_entries + vae.decoder_num_blocks * attention)
    head = 2 * work.tokens * head_entries
    parts: dict[str, float] = {"encoder": encoder}
    if work.vae_learns:
        times = 1 if work.learns == "decoder" else 3
        parts = {"encoder": times * encoder, "decoder": 3 * decoder, "head": 3 * head}
        if work.masked:
            parts["masked stream"] = 3 * (encoder + decoder + head)
    if not work.dit_learns:
        return parts
    if work.vae_learns:
        parts["reference encoder"] = encoder
    if work.prefixes:
        parts["prefixes"] = work.prefixes * encoder
    size = dit.block_size // dit.patch_size
    pairs = two_copy_pairs(blocks, size, work.copies)
    timestep_entries = adaln_entries(prior)
    parts["DiT"] = 3 * work.rows * prior_flops(prior, _dit_positions(dit, work, blocks), pairs)
    timesteps = work.rows * work.copies * (blocks if work.per_block else 1) + (blocks > 1)
    parts["AdaLN"] = 3 * 2 * timesteps * timestep_entries
    if work.guesses:
        parts["first guesses"] = work.guesses * (parts["DiT"] + parts["AdaLN"]) / 3
    if work.consistency:
        parts["consistency"] = (parts["DiT"] + parts["AdaLN"]) / 3
    return parts


def _dit_positions(dit: DiTConfig, work: Work, blocks: int) -> int:
    """Positions of one row: the clean copy without its last block, and the noisy copies."""
    return (blocks - 1 + work.copies * blocks) * (dit.block_size // dit.patch_size)


def adaln_entries(prior: DiT, pictures: bool = False) -> int:
    """Return the entries of the matrices that only a timestep is multiplied by.

    Args:
        pictures: of passes that hold pictures, where both halves of dual layers take part.
    """
    blocks = sum(matrix_entries(module) for module in prior.modules() if isinstance(module, AdaLN))
    halves = 0 if pictures else sum(matrix_entries(block.image.ada) for block in dual_blocks(prior))
    times = [prior.emb_in, prior.emb_in2] if prior.config.landing_time else [prior.emb_in]
    return blocks - halves + matrix_entries(prior.txt_out_ada) + sum(map(matrix_entries, times))


def dual_blocks(prior: DiT) -> list[DualBlock]:
    """Return the layers that have weights of their own for pictures."""
    return [block for block in prior.blocks if isinstance(block, DualBlock)]


def position_entries(prior: DiT) -> int:
    """Return the entries of the matrices that a position is multiplied by, of text or of a picture alike."""
    entries = matrix_entries(prior) - adaln_entries(prior, pictures=True)
    entries -= sum(
        matrix_entries(block.image) - matrix_entries(block.image.ada) for block in dual_blocks(prior)
    )
    if prior.config.img_grid is not None:  # A picture's input and output are in the place of the text's.
        entries -= matrix_entries(prior.img_in) + matrix_entries(prior.img_out)
    return entries


# --- memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """How a step is laid out on one rank.

    Attributes:
        micro_batch: rows of a pass.
        shards: ranks that share one copy of weights, gradients and optimiser; 1 is unsharded.
        checkpointing: the DiT's blocks are computed again in the backward pass.
        bfloat16: matrix products are in bfloat16, weights in float32.
        muon: the matrices of transformer blocks, AdaLN aside, have Muon's one buffer, not AdamW's two.
        ema: averaged weights are kept.
        train: what of the DiT learns, see :class:`colada.train.kinds.FlowTerms`.
        rank: of its products of low rank.
    """

    micro_batch: int
    shards: int = 1
    checkpointing: bool = False
    bfloat16: bool = True
    muon: bool = False
    ema: bool = False
    train: str = "all"
    rank: int = 0


def memory_per_rank(vae: TextVAEConfig, dit: DiTConfig, work: Work, placement: Placement) -> dict[str, float]:
    """Return the bytes a rank needs by part; the parts add up to the peak.

    Exact, up to the rounding of shards and a few bytes a tensor: "weights" and "gradients" (4 bytes a
    trained parameter), "optimiser" (AdamW 8, Muon 4; with low rank W0's 4, and 12 a number of the factors),
    "average" (4) and "frozen networks" (4; the Text VAE where the DiT learns, or its reference copy), each
    divided by the shards.

    Estimates, of uncompiled networks:

    - "working copy": what products read. Sharded, the largest transformer block and all that
      is outside blocks, gathered; unsharded, the bfloat16 copy of every matrix. 2 bytes an entry, 4
      in float32, where the unsharded weights need no copy.
    - "activations": kept for the backward pass, per position. With D = dim, F = ffn_dim of the
      Text VAE, D = txt_dim, W = heads * head_dim, F = expand_ratio * D of the DiT, and e = 4 bytes, or 2 in
      bfloat16, where norms keep float32 copies, an encoder or decoder layer keeps
      e (9 D + 2 F) + (4 - e) 7 D, a DiT layer e (12 D + 6 W + 2 F) + (4 - e) (4 D + 4 W), the DiT's
      output 4 e D; with dropout, 2 D bytes of masks a layer. With checkpointing a DiT layer keeps its input,
      e D, and one layer at a time all of it.
    - "logits": V (e + 8) bytes a token in bfloat16, V 8 in float32, while their gradient is computed,
      and V 4 more for a masked stream.

    Not counted: the device's own context, fragmentation, the scratch space of kernels, and the
    passing needs of frozen networks, which come before the peak.

    Raises:
        ColadaError: if a row is not a whole number of blocks.
    """
    text, prior = networks(vae, dit)
    trained: list[nn.Module] = [text] * work.vae_learns + [prior] * work.dit_learns
    parts = state_bytes(trained, placement)
    if work.dit_learns:
        parts["frozen networks"] = 4 * parameters_of(text) / placement.shards
    return parts | _activations(vae, dit, work, placement)


def state_bytes(trained: Sequence[nn.Module], placement: Placement) -> dict[str, float]:
    """Return what networks that learn need beside activations, see :func:`memory_per_rank`."""
    parameters = sum(parameters_of(network) for network in trained)
    gradients = sum(learning_entries(network, placement.train) for network in trained)
    moments = 2 * gradients
    if placement.muon:
        moments -= sum(_muon_entries(network, placement.train) for network in trained)
    if placement.train == "lora":  # W0 in place of moments, and three times the factors.
        factors = [factor_entries(network, placement.rank) for network in trained if isinstance(network, DiT)]
        moments = gradients + 3 * sum(factors)
    parts = {
        "weights": 4 * parameters / placement.shards,
        "gradients": 4 * gradients / placement.shards,
        "optimiser": 4 * moments / placement.shards,
    }
    if placement.ema:
        parts["average"] = 4 * parameters / placement.shards
    entry = 2 if placement.bfloat16 else 4
    if placement.shards > 1:
        parts["working copy"] = float(entry * sum(map(_gathered_entries, trained)))
    elif placement.bfloat16:
        parts["working copy"] = float(entry * sum(map(matrix_entries, trained)))
    return parts


def _activations(vae: TextVAEConfig, dit: DiTConfig, work: Work, placement: Placement) -> dict[str, float]:
    blocks, rows = work.blocks(vae), placement.micro_batch
    entry = 2 if placement.bfloat16 else 4
    total, parts = 0, dict[str, float]()
    if work.vae_learns:
        streams = 1 + work.masked
        layer = entry * (9 * vae.dim + 2 * vae.ffn_dim) + (4 - entry) * 7 * vae.dim
        layers = vae.decoder_num_blocks
        if work.learns != "decoder":
            layers += vae.encoder_num_blocks
        total += streams * blocks * vae.block_size * layers * layer
        logit = (entry + 8 if placement.bfloat16 else 8) + 4 * (streams - 1)
        parts["logits"] = float(rows * work.length * vae.vocab_size * logit)
    if work.dit_learns:
        each = dit_position_bytes(dit, placement, work.dropout)
        total += _dit_positions(dit, work, blocks) * each
    return {"activations": float(rows * total), **parts}


def dit_position_bytes(dit: DiTConfig, placement: Placement, dropout: bool = False) -> int:
    """Return the bytes of activations of a position, see :func:`memory_per_rank`."""
    dim, width, entry = dit.txt_dim, dit.heads * dit.head_dim, 2 if placement.bfloat16 else 4
    layer = entry * ((12 + 2 * dit.expand_ratio) * dim + 6 * width) + (4 - entry) * 4 * (dim + width)
    layer += 2 * dim * dropout
    stored_bytes = dit.num_layers * entry * dim + layer if placement.checkpointing else dit.num_layers * layer
    return stored_bytes + 4 * entry * dim


def _muon_entries(network: nn.Module, train: str) -> int:
    """Entries of the matrices of transformer blocks that learn, AdaLN aside."""
    named = learning(network, train).items()
    return sum(p.numel() for name, p in named if p.ndim == 2 and "blocks." in name and ".ada." not in name)


def _gathered_entries(network: nn.Module) -> int:
    """Parameters of the largest transformer block and of all that is outside blocks."""
    stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    blocks = [parameters_of(block) for stack in stacks for block in stack]
    return parameters_of(network) - sum(blocks) + max(blocks)


# --- a baseline ----------------------------------------------------------------------------------


def decoder_flops(config: DecoderConfig, rows: int, length: int) -> dict[str, float]:
    """Return the useful FLOPs of a step by part.

    With W the matrix entries of the layers and P visible pairs of a row of L tokens, L (L + 1) / 2 for AR and
    L^2 for LLaDA, three times (forward and backward)

    - decoder: rows * (2 L W + 4 layers dim P)
    - head: rows * 2 L dim V; for LLaDA half of it, as half of the tokens are masked on average
    """
    network = decoder_network(config)
    head_entries = matrix_entries(network.lm_head)
    layers = 2 * length * (matrix_entries(network) - head_entries)
    causal = config.objective == "ar"
    pairs = block_causal_pairs(length, 1) if causal else length**2
    attention = 4 * config.num_layers * config.dim * pairs
    head = 2 * length * head_entries * (1.0 if causal else 0.5)
    return {"decoder": 3.0 * rows * (layers + attention), "head": 3.0 * rows * head}


def decoder_memory(config: DecoderConfig, length: int, placement: Placement) -> dict[str, float]:
    """Return the bytes a rank needs by part; estimates as :func:`memory_per_rank`.

    With D = dim, F = ffn_dim and e = 4 bytes, or 2 in bfloat16, a layer keeps
    e (11 D + 4 F) + (4 - e) 6 D bytes a position.
    """
    entry = 2 if placement.bfloat16 else 4
    layer = entry * (11 * config.dim + 4 * config.ffn_dim) + (4 - entry) * 6 * config.dim
    stored_bytes = config.num_layers * layer
    if placement.checkpointing:
        stored_bytes = config.num_layers * entry * config.dim + layer
    rows = placement.micro_batch
    return {
        **state_bytes([decoder_network(config)], placement),
        "activations": float(rows * length * stored_bytes),
        "logits": float(rows * length * config.vocab_size * (entry + 8 if placement.bfloat16 else 8)),
    }


# --- the steps of a stage -------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Steps that all compute the same: a stage, or those steps of one in which the same networks learn.

    Attributes:
        name: as printed.
        steps: how many.
        tokens: of a step, over all ranks.
        flops: useful ones of a step by part.
        memory: bytes a rank needs by part.
        placement: how a step lies on a rank.
        work: what else describes a step.
        narrow_flops: 6 N D of a step, N the parameters of the network that generates latents or tokens (the
            DiT; a decoder without its embedding), D its tokens; 0 where that does not learn.
    """

    name: str
    steps: int
    tokens: int
    flops: Mapping[str, float]
    memory: Mapping[str, float]
    placement: Placement
    work: Mapping[str, Any]
    narrow_flops: float


def cola_phase(
    name: str, steps: int, vae: TextVAEConfig, dit: DiTConfig, work: Work, placement: Placement
) -> Phase:
    """Return steps of a Cola DLM's run."""
    flops, memory = training_flops(vae, dit, work), memory_per_rank(vae, dit, work, placement)
    narrow = 6.0 * parameter_counts(vae, dit)["DiT"] * work.tokens * work.dit_learns
    return Phase(name, steps, work.tokens, flops, memory, placement, asdict(work), narrow)


def decoder_phase(config: DecoderConfig, name: str, section: StageSection, placement: Placement) -> Phase:
    """Return the steps of a baseline's stage."""
    rows, length = section.batch, section.length
    return Phase(
        name,
        section.steps,
        rows * length,
        decoder_flops(config, rows, length),
        decoder_memory(config, length, placement),
        placement,
        {"rows": rows, "length": length},
        6.0 * (config.parameters - config.embeddings * config.dim) * rows * length,
    )


# --- in words ------------------------------------------------------------------------------------

_SCALES = {
    "": (1000, ("", "K", "M", "B", "T")),
    "FLOP": (1000, ("", "K", "M", "G", "T", "P", "E", "Z", "Y")),
    "B": (1024, ("", "Ki", "Mi", "Gi", "Ti")),
}


def scaled(value: float, unit: Literal["", "FLOP", "B"] = "") -> str:
    """Return a count ("1.83 B", billions), FLOPs ("4.20 PFLOP") or bytes ("12.3 GiB") in three digits."""
    base, prefixes = _SCALES[unit]
    step = 0
    while value >= base and step < len(prefixes) - 1:
        value, step = value / base, step + 1
    digits = 0 if step == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {prefixes[step]}{unit}".rstrip()
