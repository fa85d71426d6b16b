"""Few evaluations a block: learnt solvers, and students that are told where a step ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import colada
from colada.errors import ColadaError
from colada.flow import Evaluation, evaluations_of, front_loaded
from colada.generate.engine.engine import Engine
from colada.generate.reference import transport
from colada.generate.settings import UNGUIDED, RequestSettings, check_settings
from colada.models.cola import ColaDLM
from colada.networks.dit import DiT
from colada.networks.layers import KVCache
from colada.networks.solver import GUIDED, LearntSolver
from helpers import reference, request, tiny_dit, tiny_model
from test_engine import mixed_requests, same, serve


def learnt(count: int, seed: int = 0) -> dict[str, Any]:
    """A solver of some evaluations with numbers near those of Euler's."""
    solver = LearntSolver(count)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            solver.first_value(name, parameter)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return dict(solver.settings()["solver"])


@pytest.fixture(scope="module", params=["velocity", "z0"])
def model(request: pytest.FixtureRequest) -> ColaDLM:
    return tiny_model(3, dit={"prediction": request.param})


# --- a learnt solver ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [None, 16])
def test_learnt_solvers_among_others_give_what_each_gives_in_the_readable_loop(
    model: ColaDLM, bucket: int | None
) -> None:
    requests = mixed_requests(model, 5)
    for number in (1, 4, 6):
        settings = replace(requests[number].settings, solver=learnt(number, number))
        requests[number] = replace(requests[number], settings=settings)
    for found, own in zip(
        serve(Engine(model.vae, model.dit, capacity=200, slots=4, bucket=bucket), requests),
        requests,
        strict=True,
    ):
        same(found, reference(model, own))


def test_eulers_numbers_make_eulers_texts(model: ColaDLM) -> None:
    solver = LearntSolver(5)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            solver.first_value(name, parameter)
    numbers = solver.settings()["solver"]
    assert numbers["grid"] == pytest.approx(front_loaded(5)[:-1].tolist(), abs=1e-6)
    assert sum(parameter.numel() for parameter in LearntSolver(6).parameters()) == 33
    assert sum(parameter.numel() for parameter in LearntSolver(8).parameters()) == 52
    own = request(model, range(1, 8), 8, 0, steps=5, schedule="front-loaded", guidance=3.0)
    same(
        reference(model, replace(own, settings=replace(own.settings, solver=numbers))), reference(model, own)
    )


def test_a_learnt_solver_by_hand() -> None:
    """z_k+1 = alpha_k z_k + sum of beta_kj x_j, x_j where the network points from z_j."""
    solver = {"kind": "bns", "grid": [1, 0.5], "alpha": [0.3, -0.1], "beta": [[0.6], [0.2, 0.9]]}
    assert evaluations_of(solver, "uniform", 16) == [
        Evaluation(1, (0.6,), 0.3),
        Evaluation(0.5, (0.9, 0.2), -0.1),
    ]
    dit, z = tiny_dit(prediction="z0"), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def guess(latents: torch.Tensor, t: float) -> torch.Tensor:
        output: torch.Tensor = dit(latents[0], torch.tensor(t), dit.layout([4]))
        return output[None]

    x0 = guess(z, 1000.0)
    z1 = 0.3 * z + 0.6 * x0
    x1 = guess(z1, 500.0)
    expected = -0.1 * z1 + 0.2 * x0 + 0.9 * x1
    nothing = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, 8)
    settings = RequestSettings(guidance=1.0)
    with torch.no_grad():
        *_, (z2, last) = transport(
            dit, z, [KVCache()], *nothing, [1.0], evaluations_of(solver, "uniform", 16), settings
        )
    torch.testing.assert_close(z2, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, x1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "rk4"},
        {"grid": [1, 1]},
        {"grid": [0.9, 0.5]},
        {"grid": [1, 0]},
        {"alpha": [1]},
        {"alpha": [1, "x"]},
        {"beta": [[1], [1]]},
        {"more": 1},
    ],
)
def test_what_is_no_solver_is_refused(change: dict[str, Any]) -> None:
    solver = {"kind": "bns", "grid": [1, 0.5], "alpha": [0, 0], "beta": [[1], [0, 1]]}
    assert check_settings({"solver": solver}) == {"solver": solver}
    with pytest.raises(ColadaError, match=r"^solver=\{.*expected one of 'euler', 'ab2', 'heun', or a learnt"):
        check_settings({"solver": {**solver, **change}})


def test_a_stored_solver_is_used_and_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    numbers = learnt(3)
    tiny_model(generation={"solver": numbers, "guidance": 1}).save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["solver"] == numbers
    model = colada.load(tmp_path / "model")
    assert isinstance(model, ColaDLM)
    prompt = [list(range(1, 8))]
    (stored,) = model.generate(prompt, 8, seed=3)
    (given,) = model.generate(prompt, 8, seed=3, solver=numbers, steps=3)
    assert stored.tokens == given.tokens
    with pytest.raises(ColadaError, match=r"^steps=8: this model's learnt solver makes 3 evaluations"):
        model.generate(prompt, 8, steps=8)
    assert len(model.generate(prompt, 8, steps=8, solver="euler")[0].tokens) == 8


# --- landing times ---------------------------------------------------------------------------------


def told(seed: int = 0, **over: Any) -> DiT:
    """A DiT that is told where a step ends, and listens."""
    dit = tiny_dit(seed, landing_time=True, **over)
    with torch.no_grad():
        for layer in (dit.emb_in2.proj_in, dit.emb_in2.proj_hid, dit.emb_in2.proj_out):
            layer.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return dit


def test_a_new_landing_time_changes_no_bit() -> None:
    plain = tiny_dit(1)
    new = DiT(replace(plain.config, landing_time=True))
    new.init_weights(torch.Generator().manual_seed(5))
    assert not bool(new.emb_in2.proj_out.weight.any())
    assert bool(new.emb_in2.proj_hid.weight.any())
    missing = new.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(name.startswith("emb_in2.") for name in missing)
    z, t = torch.randn(8, 8), torch.full((8,), 600.0)
    layout = plain.layout([8])
    with torch.no_grad():
        outputs = [dit.velocity(z, t, layout, landing=t / 2) for dit in (plain, new)]
    assert torch.equal(*outputs)
    assert "landing_time" not in plain.config.to_dict()


def test_a_step_ends_where_it_is_told_and_clean_positions_nowhere() -> None:
    dit = told()
    z, t = torch.randn(8, 8), torch.full((8,), 600.0)
    layout = dit.layout([8])
    with torch.no_grad():
        one, other, itself, none = (
            dit.velocity(z, t, layout, landing=landing) for landing in (t / 2, 0 * t, t, None)
        )
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(itself, none)


@pytest.mark.parametrize("bucket", [None, 16])
@pytest.mark.parametrize("prediction", ["velocity", "z0"])
def test_students_of_several_lengths_write_together_as_alone(prediction: str, bucket: int | None) -> None:
    model = ColaDLM(tiny_model().vae, told(prediction=prediction))
    requests = mixed_requests(model, 2)
    for found, own in zip(
        serve(Engine(model.vae, model.dit, capacity=200, slots=4, bucket=bucket), requests),
        requests,
        strict=True,
    ):
        same(found, reference(model, own))


def test_the_readable_loop_tells_the_end_of_each_step() -> None:
    dit, z = told(prediction="z0"), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    grid = (1.0, 0.7, 0.0)
    nothing = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, 8)
    settings = RequestSettings(guidance=1.0)
    with torch.no_grad():
        steps = list(
            transport(dit, z, [KVCache()], *nothing, [1.0], evaluations_of("euler", grid, 2), settings)
        )
        for (a, end), (reached, _) in zip(((1.0, 0.7), (0.7, 0.0)), steps, strict=True):
            times = torch.full((4,), 1000 * a), torch.full((4,), 1000 * end)
            z = z + (end - a) * dit.velocity(z[0], times[0], dit.layout([4]), landing=times[1])[None]
            torch.testing.assert_close(reached, z, rtol=1e-5, atol=1e-5)


def test_steps_choose_one_of_a_students_grids(tmp_path: Path) -> None:
    grids = [[1, 0.9, 0.5, 0], [1, 0.7, 0], [1, 0]]
    inside = {"guidance": 5.0, "steps": [3, 2, 1], "grids": grids}
    dit = told()
    dit.config = replace(dit.config, distilled=inside)
    ColaDLM(tiny_model().vae, dit, generation={"steps": 2}).save(tmp_path / "model")
    model = colada.load(tmp_path / "model")
    assert isinstance(model, ColaDLM)
    assert model.dit.config == dit.config
    prompt = [list(range(1, 8))]
    for steps in (1, 2, 3):
        chosen = model.chosen({"steps": steps})
        assert chosen["schedule"] == tuple(grids[3 - steps])
        by_grid = model.chosen({"steps": steps, "schedule": grids[3 - steps]})
        assert chosen == by_grid
    assert model.chosen({})["steps"] == 2
    texts = {tuple(model.generate(prompt, 16, steps=steps)[0].tokens) for steps in (1, 2, 3)}
    assert len(texts) > 1
    words = r"steps=4: this model makes 3 steps along a = \[1, 0.9, 0.5, 0\] or 2 steps"
    with pytest.raises(ColadaError, match=words):
        model.generate(prompt, 8, steps=4)


def test_a_learnt_solver_keeps_all_that_says_how_a_velocity_is_guided() -> None:
    assert set(GUIDED) == set(UNGUIDED)
    solver, guided = LearntSolver(2), {"guidance": 3.0, "guidance_against": "latents", "guidance_cap": 1.25}
    guided["guidance_rescale"] = 0.5
    solver.learn_under(guided)
    assert guided.items() <= solver.settings().items()
