"""What a session drives, whatever the model: requests that wait, are under way, and leave one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from colada.errors import ColadaError
from colada.generate.noise import Noise
from colada.generate.reference import TransportStep
from colada.generate.settings import RequestSettings


class Guess(NamedTuple):
    """How a block under way would read: solver steps done and to do, ids, how likely each is, latents.

    A picture has no ids, but the latents ``z0`` that it would have.
    """

    step: int
    steps: int
    ids: list[int]
    confidence: tuple[float, ...]
    latents: Tensor
    z0: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        ids: the prompt.
        new_tokens: how many tokens are to follow it; blocks are generated whole.
        settings: all of them, checked.
        hole: latents (start, end) of ``ids`` to be generated, in place of what follows; the others
            of their blocks are pinned.
        confidence: blocks say how likely their tokens are.
        latents: its completion has its latents and the ids of whole blocks, of models that have latents.
        noise: of its latents, in place of what the settings say.
        draws: latents of a picture that is drawn after the prompt, in place of text; 0: none.
        picture: latents (M, C) of a picture that the text is about, which follows the prompt.
    """

    ids: tuple[int, ...]
    new_tokens: int
    settings: RequestSettings
    hole: tuple[int, int] | None = None
    confidence: bool = False
    latents: bool = False
    noise: Noise | None = None
    draws: int = 0
    picture: Tensor | None = field(default=None, compare=False)


@dataclass(eq=False)
class Slot:
    """A request under way; its model's own class has what else that needs.

    Attributes:
        request: what was asked for.
        blocks: how many blocks are written.
        ids: of the last of them.
        confidence: how likely each of these is, where that is asked for.
        seen: all ids so far.
        drawn: latents (M, C) of a picture, once it is finished.
        error: why it failed; nothing more comes.
    """

    request: Request
    blocks: int = 0
    ids: list[int] = field(default_factory=list)
    confidence: tuple[float, ...] | None = None
    seen: set[int] = field(default_factory=set)
    drawn: Tensor | None = None
    error: ColadaError | None = None

    @property
    def written(self) -> Tensor | None:
        """The latents (L, C) that the last block has added, of models that have such."""
        return None

    def take(self, ids: list[int], confidence: tuple[float, ...] | None) -> None:
        """Count a block that is written."""
        self.ids, self.confidence = ids, confidence
        self.seen.update(ids)
        self.blocks += 1


S = TypeVar("S", bound=Slot)


class Writer(ABC, Generic[S]):
    """Writes blocks for requests that come and go: first come, first served, as far as there is room.

    Args:
        capacity: positions of KV cache in all; a request takes its :meth:`room` while it is under way.
        slots: requests under way at most; None is no limit.

    Attributes:
        under_way: those who have a slot, in the order in which they got it.
    """

    unit = "tokens"
    """Of the KV cache."""

    def __init__(self, capacity: int, slots: int | None) -> None:
        self.capacity, self.slots = capacity, slots
        self.waiting: deque[Request] = deque()
        self.under_way: list[S] = []

    @abstractmethod
    def room(self, request: Request) -> int:
        """Return how many positions of KV cache a request takes."""

    @abstractmethod
    def next_block(self) -> Iterator[TransportStep]:
        """Admit who waits and write a round; who is not finished before the round's end goes on in the next.

        Yields after every solver step, where the model has such. What fails for one request alone is its
        slot's ``error``.
        """

    def guesses(self, step: TransportStep, asking: Collection[S]) -> dict[S, Guess]:
        """Return how the coming blocks of slots would read now, of models that have such a thing."""
        return {}

    @property
    def news(self) -> list[S]:
        """Those to whom the last round brought a block or an error."""
        return self.under_way

    @property
    def busy(self) -> bool:
        """Whether anyone waits or is under way."""
        return bool(self.waiting or self.under_way)

    def submit(self, request: Request) -> None:
        """Let a request wait for its admission.

        Raises:
            ColadaError: if it could never be admitted; nothing else is affected.
        """
        room = self.room(request)
        if room > self.capacity:
            raise ColadaError(
                f"a request of {room} {self.unit}, expected at most {self.capacity}: the KV cache's room"
            )
        self.waiting.append(request)

    def withdraw(self, request: Request) -> None:
        """Take back a request that waits; one that does not is no error."""
        self.waiting = deque(one for one in self.waiting if one is not request)

    def leave(self, slot: S) -> None:
        """Take a slot out between rounds; its room is free again."""
        self.under_way.remove(slot)
