"""The engine where it went wrong: state shared by two users, weights that change, long prompts, shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from colada.engine import kernels
from colada.engine.engine import Engine
from colada.engine.kernels import packed_weight
from colada.model import ColaDLM
from helpers import tiny_dit, tiny_model

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines as they are on a GPU, kept between calls, but nothing is captured."""
    monkeypatch.setattr("colada.model.Engine", partial(Engine, bucket=32))
    monkeypatch.setattr("colada.engine.engine.history_unit", lambda size, device: 32)


# --- an engine has one user ---------------------------------------------------------------------


def test_sessions_and_calls_in_any_order_never_share_an_engine(bucketed: None) -> None:
    model = tiny_model()
    expected = [tiny_model().generate(PROMPT, 9, steps=2, seed=seed)[0].tokens for seed in range(3)]
    model.generate(PROMPT, 9, steps=2)  # leaves an engine to be kept
    one, other = model.session(history=64), model.session(history=64)
    one.submit(PROMPT, 9, steps=2, seed=0)
    stream = model.stream(PROMPT, 9, steps=2, seed=2)
    first = next(stream)
    other.submit(PROMPT, 9, steps=2, seed=1)
    assert model.generate(PROMPT, 9, steps=2, seed=1)[0].tokens == expected[1]
    for session, tokens in ((one, expected[0]), (other, expected[1])):
        chunks = [chunk for chunk in session.chunks() if chunk.step is None]
        assert sum((chunk.tokens for chunk in chunks), ()) == tokens
    assert first.tokens + sum((chunk.tokens for chunk in stream), ()) == expected[2]
    idle = model.session(history=64)
    assert model.generate(PROMPT, 9, steps=2, seed=0)[0].tokens == expected[0]
    idle.submit(PROMPT, 9, steps=2, seed=1)
    assert sum((chunk.tokens for chunk in idle.chunks()), ()) == expected[1]


# --- weights may change between calls -----------------------------------------------------------


def _step_of_an_optimiser(model: ColaDLM) -> None:
    optimiser = torch.optim.AdamW(model.dit.parameters(), lr=0.1)
    for parameter in model.dit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()


def _other_weights(model: ColaDLM) -> None:
    model.dit.load_state_dict(tiny_dit(seed=5).state_dict())


def _merged_adapter(model: ColaDLM) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.dit.modules():
        if isinstance(module, nn.Linear):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            module.weight.data += 0.1 * up @ down


def _pruned_row(model: ColaDLM) -> None:
    for block in model.dit.blocks:
        block.mlp.proj_in.weight.data[7] = 5.0  # type: ignore[union-attr, operator, index]


def _moved_weights(model: ColaDLM) -> None:
    for parameter in model.dit.parameters():
        parameter.data = -parameter.data


def _scaled_modulation(model: ColaDLM) -> None:
    with torch.inference_mode():
        for name, parameter in model.dit.named_parameters():
            if ".ada." in name:
                parameter.mul_(3)


CHANGES = [
    _step_of_an_optimiser,
    _other_weights,
    _merged_adapter,
    _pruned_row,
    _moved_weights,
    _scaled_modulation,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("kept", [False, True], ids=["new engine", "kept engine"])
def test_weights_that_change_are_those_that_write(
    change: Callable[[ColaDLM], None], kept: bool, request: pytest.FixtureRequest
) -> None:
    if kept:
        request.getfixturevalue("bucketed")

    def latents(model: ColaDLM) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        model.generate(PROMPT, 5, steps=2, callback=lambda step: seen.append(step.latents))
        return seen[-1]

    model, never_asked = tiny_model(), tiny_model()
    session = model.session(history=64)
    session.submit(PROMPT, 5, steps=2)
    before = latents(model)
    list(session.chunks())
    for own in (model, never_asked):
        change(own)
    expected = latents(never_asked)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(latents(model), expected)
    session.submit(PROMPT, 5, steps=2)
    seen: list[torch.Tensor] = []
    list(session.chunks(callback=lambda step: seen.append(step.latents)))
    torch.testing.assert_close(seen[-1], expected)


@pytest.fixture
def reorders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the weights of which packed copies were made."""
    if not kernels.ONEDNN:
        pytest.skip("no oneDNN here")
    made: list[int] = []

    def count(layer: nn.Linear) -> torch.Tensor:
        before = kernels._PACKED.get(layer)
        packed = packed_weight(layer)
        if before is None or kernels._PACKED[layer] is not before:
            made.append(layer.weight.nbytes)
        return packed

    monkeypatch.setattr(kernels, "packed_weight", count)
    return made


def test_packed_weights_are_made_once_a_model_and_go_with_it(reorders: list[int]) -> None:
    model = tiny_model()
    for _ in range(3):
        model.generate(PROMPT, 5, steps=1)
    matrices = 4 * model.dit.config.num_layers
    assert len(reorders) == matrices
    with torch.no_grad():
        model.dit.blocks[1].mlp.proj_out.weight[3, 3] += 1  # type: ignore[union-attr, operator, index]
    model.generate(PROMPT, 5, steps=1)
    assert len(reorders) == matrices + 1
    alive = len(kernels._PACKED)
    del model
    assert len(kernels._PACKED) <= alive - matrices


def test_packed_weights_of_many_models_are_bounded_in_bytes(
    reorders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_model(seed=seed) for seed in range(4)]
    models[0].generate(PROMPT, 5, steps=1)
    bound = int(2.5 * sum(reorders))
    monkeypatch.setattr(kernels, "PACKED_BYTES", bound)
    for model in models:
        model.generate(PROMPT, 5, steps=1)
        assert sum(own.bytes for own in kernels._PACKED.values()) <= bound
