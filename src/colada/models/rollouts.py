"""What a Cola DLM writes, with the latents that it has written: what training on its own answers needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from colada.generate.settings import TextRequest
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.text.transcript import Completion, Transcript


@dataclass(frozen=True)
class Rollout:
    """An answer.

    Attributes:
        completion: its text and tokens, and how it ended.
        ids: of all blocks that were written, from where the prompt ends, with what follows an end token.
        latents: (M, C), of the whole prompt blocks, and of each block as it was committed.
    """

    completion: Completion
    ids: tuple[int, ...]
    latents: Tensor


@dataclass
class _Under:
    """A request under way."""

    request: Request
    transcript: Transcript
    ids: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def roll_out(model: ColaDLM, requests: Sequence[TextRequest], batch: int = 64) -> list[Rollout]:
    """Write answers through the engine, ``batch`` at a time, and keep their latents on the CPU.

    Raises:
        ColadaError: for a request that cannot be, or that fails.
    """
    under = [_Under(*model._open(one.prompt, one.max_new_tokens, one.settings)) for one in requests]
    by_request = {id(one.request): one for one in under}
    engine = model._writer_for([one.request for one in under], batch)
    for one in under:
        engine.submit(one.request)
    while engine.busy:
        for _ in engine.next_block():
            pass
        for slot in list(engine.news):
            one = by_request[id(slot.request)]
            if slot.error is not None:
                raise slot.error
            assert slot.block is not None
            if not one.latents:
                one.latents.append(slot.latents[: slot.prefix].float().cpu())
            one.latents.append(slot.block.latents.float().cpu())
            one.ids += slot.ids[one.transcript.skip :]
            one.transcript.add(slot.ids)
            if one.transcript.finish_reason is not None:
                engine.leave(slot)
    model._keep(engine)
    return [
        Rollout(
            one.transcript.completion(one.request.settings.seed),
            tuple(one.ids),
            torch.cat(one.latents).clone(),
        )
        for one in under
    ]
