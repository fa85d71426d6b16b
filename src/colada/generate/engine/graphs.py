"""Passes of equal shape, captured once and replayed: on a GPU a replay is one launch in place of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from colada.generate.engine.memory import PaddedRows
from colada.generate.engine.passes import PriorPass

_KEPT_GRAPHS = 128


class _Graph:
    """One pass with inputs that stay where they are.

    Args:
        prior: the pass.
        latents, row, plan, rotations: its first arguments.
        pool: memory that it shares with other captured passes, which never run at the same time.
    """

    def __init__(
        self,
        prior: PriorPass,
        latents: Tensor,
        row: Tensor,
        plan: PaddedRows,
        rotations: Tensor,
        pool: Any,
    ) -> None:
        self._prior, self._plan, self._taken = prior, plan.copy(), plan
        self._latents, self._row, self._rotations = latents.clone(), row.clone(), rotations.clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)
        if latents.is_cuda:
            aside = torch.cuda.Stream(latents.device)
            aside.wait_stream(torch.cuda.current_stream(latents.device))
            with torch.cuda.stream(aside):
                self._run()  # lets libraries allocate what they keep
            torch.cuda.current_stream(latents.device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = self._run()

    def _run(self) -> Tensor:
        return self._prior(self._latents, self._row, self._plan, self._rotations)

    def __call__(self, latents: Tensor, row: Tensor, plan: PaddedRows, rotations: Tensor) -> Tensor:
        self._latents.copy_(latents)
        self._row.copy_(row)
        if plan is not self._taken:
            self._plan.take(plan)
            self._rotations.copy_(rotations)
            self._taken = plan
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._output.clone()


class Graphs:
    """Runs padded passes as replays; elsewhere than on a GPU, as what would be replayed.

    Args:
        prior: the pass.

    Attributes:
        captures: how many passes were captured so far.
    """

    def __init__(self, prior: PriorPass) -> None:
        self._prior = prior
        self._kept: OrderedDict[object, _Graph] = OrderedDict()
        self._places = self._weights()
        cuda = prior.dit.txt_in.proj.weight.is_cuda
        self._pool = torch.cuda.graph_pool_handle() if cuda else None
        self.captures = 0

    def _weights(self) -> list[tuple[int, int]]:
        """Return which parameters there are and where; a quantised one has no place of its own."""
        return [
            (id(weight), weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) else 0)
            for weight in self._prior.dit.parameters()
        ]

    def refresh(self) -> None:
        """Forget the passes if weights are elsewhere now; those changed in place are read as they are."""
        if self._weights() != self._places:
            self._kept.clear()
            self._places = self._weights()

    def __len__(self) -> int:
        """Return the number of passes that are kept."""
        return len(self._kept)

    def __call__(self, latents: Tensor, row: Tensor, plan: PaddedRows, rotations: Tensor) -> Tensor:
        """Run a pass, with a modulation row each; arguments and result as :class:`PriorPass`."""
        key = plan.shape, self._prior.modulation.version
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = _Graph(self._prior, latents, row, plan, rotations, self._pool)
            self.captures += 1
            if len(self._kept) > _KEPT_GRAPHS:
                self._kept.popitem(last=False)
        return self._kept[key](latents, row, plan, rotations)
