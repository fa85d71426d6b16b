"""A Cola DLM from a text file, with the package's public pieces and no trainer: read it from top to bottom.

    python examples/train_minimal.py                  # the stories of the tests: a minute or two on two cores
    python examples/train_minimal.py my.txt --vocab-size 4096 --out my-model

Stage 1 trains the Text VAE: tokens become continuous latents and tokens again. Stage 2 trains the DiT, which
carries noise to latents, block after block, by flow matching. `colada train` does the same with recipes,
mixtures of sources, validation, exact resume and many ranks; src/colada/train/losses.py has the equations.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from colada import ColaDLM, DiT, DiTConfig, TextVAE, TextVAEConfig
from colada.data.rows import Batch
from colada.text.tokenizer import END_OF_TEXT, Tokenizer
from colada.train.kinds import FlowTerms, TextVAETerms
from colada.train.losses import Loss, prior_loss, readable, vae_loss
from colada.train.noise import StepNoise, draw_noise

STORIES = Path(__file__).parents[1] / "tests" / "data" / "stories.txt"
LENGTH = 64  # tokens a row
ROWS = 16  # a step


# --- data: one long stream of tokens, each document ended by the end-of-text token -----------------


def read_stream(path: Path, vocab_size: int) -> tuple[Tokenizer, torch.Tensor]:
    """Return a tokenizer learnt from the documents of a text file, and all their tokens (N,)."""
    documents = [text.strip() for text in path.read_text(encoding="utf-8").split(END_OF_TEXT) if text.strip()]
    tokenizer = Tokenizer.train(documents, vocab_size)
    token_ids = [token for text in documents for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    if len(token_ids) <= LENGTH:
        raise SystemExit(f"{path} has {len(token_ids)} tokens, expected more than a row of {LENGTH}")
    return tokenizer, torch.tensor(token_ids)


def draw_rows(stream: torch.Tensor, generator: torch.Generator) -> Batch:
    """Return rows that begin anywhere in the stream: ids (ROWS, LENGTH)."""
    begins = torch.randint(len(stream) - LENGTH, (ROWS, 1), generator=generator)
    return Batch(stream[begins + torch.arange(LENGTH)])


# --- networks ------------------------------------------------------------------------------------


def make_networks(tokenizer: Tokenizer) -> tuple[TextVAE, DiT]:
    """Return both networks with random weights, small enough for a minute on a CPU."""
    vae = TextVAEConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        dim=64,
        ffn_dim=128,
        num_heads=4,
        encoder_num_blocks=1,
        decoder_num_blocks=1,
        latent_dim=16,  # numbers a latent; here a latent is a token (patch_size=1)
        block_size=4,  # latents that are generated together
        init_std=0.1,
    )
    dit = DiTConfig(
        txt_in_channels=vae.latent_dim,
        txt_out_channels=vae.latent_dim,
        block_size=vae.block_size,
        txt_dim=128,
        emb_dim=128,
        heads=4,
        head_dim=32,
        rope_dim=24,
        num_layers=2,
        prediction="z0",  # the network's output is a guess of z0, from which the velocity follows
    )
    networks = TextVAE(vae), DiT(dit)
    for network in networks:
        network.init_weights()
    return networks


# --- the loop that both stages share ---------------------------------------------------------------


def train(
    title: str,
    network: nn.Module,
    steps: int,
    rate: float,
    loss_of_step: Callable[[], Loss],
    averaged: float | None = None,
) -> None:
    """Take AdamW's steps with warm-up and cosine; leave the average of the weights, if asked."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = min(20, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.525 + 0.475 * math.cos(math.pi * step / steps)),
    )
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of_step()
        optimiser.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = 0.0 if averaged is None else min(averaged, step / (step + 10))
        for name, parameter in network.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        if step % 50 == 0 or step == steps:
            shown = [
                (name, value) for name, value in readable(loss.terms).items() if isinstance(value, float)
            ]
            terms = " ".join(f"{name} {value:.3f}" for name, value in shown)
            print(f"{title} step {step}/{steps} ({time.perf_counter() - begin:.0f} s): {terms}", flush=True)
    network.load_state_dict(average, strict=False)


def main(arguments: Iterable[str] | None = None) -> ColaDLM:
    """Train both stages, save the model, and print a sample."""
    parser = argparse.ArgumentParser(description="Train a small Cola DLM from a text file.")
    parser.add_argument(
        "text", nargs="?", type=Path, default=STORIES, help="documents, <|endoftext|> between"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="directory of the model")
    parser.add_argument("--vocab-size", type=int, default=480)
    parser.add_argument("--steps", type=int, nargs=2, default=(150, 800), help="of stage 1 and stage 2")
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    tokenizer, stream = read_stream(options.text, options.vocab_size)
    vae, dit = make_networks(tokenizer)
    terms = TextVAETerms(beta=3e-3, mask=0.5)
    print(
        f"{len(stream):,} tokens, {sum(p.numel() for n in (vae, dit) for p in n.parameters()):,} parameters"
    )

    def noise(terms: TextVAETerms | None, flow: FlowTerms | None) -> StepNoise:
        # Everything random in a loss is drawn first: the loss is then a plain function.
        return draw_noise([generator] * ROWS, vae.config, LENGTH, terms, flow)

    # Stage 1: -log p(x | z0) + beta KL(q(z0 | x) || N(0, I)) + lambda_mask L_mask
    train(
        "stage 1",
        vae,
        options.steps[0],
        4e-3,
        lambda: vae_loss(vae, draw_rows(stream, generator), noise(terms, None), terms),
    )

    # Stage 2: || v(z_t, t; z0 of the blocks before) - (z1 - z0) ||^2 over the latents of the frozen Text VAE
    vae.requires_grad_(False)
    train(
        "stage 2",
        dit,
        options.steps[1],
        3e-3,
        lambda: prior_loss(
            vae, dit, draw_rows(stream, generator), noise(None, FlowTerms()), tokenizer.pad_id
        ),
        averaged=0.98,
    )

    model = ColaDLM(vae, dit, tokenizer, generation={"steps": 8, "guidance": 2.0})
    model.save(options.out)  # the released format: colada generate --model OUT
    (sample,) = model.generate("One morning", 48)
    print(f"One morning{sample.text}")
    return model


if __name__ == "__main__":
    main()
