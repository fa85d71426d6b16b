"""Pictures in the engine: drawn and described beside texts, equal to the readable loop, and as alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from colada.errors import ColadaError, ColadaWarning
from colada.generate.engine import kernels
from colada.generate.engine.engine import Engine
from colada.generate.noise import sample_noise
from colada.generate.pictures import append_block, describe_block, draw_latents, show
from colada.generate.reference import TransportStep, encode
from colada.generate.settings import RequestSettings
from colada.generate.writer import Request
from colada.models.cola import ColaDLM
from colada.models.difference import save_difference
from colada.models.load import load_cola
from colada.networks import dit
from colada.networks.layers import KVCache
from colada.pictures.codec import fit
from colada.pictures.config import CodecConfig
from colada.pictures.sources import open_source
from colada.text.transcript import GenerationError
from helpers import reference, request, tiny_dit, tiny_model, tiny_vae

# Six latents of five numbers a picture, in blocks of four of eight for text: nothing divides anything.
LATENTS, CHANNELS, BLOCK = 6, 5, 4
GENERATOR = torch.Generator().manual_seed(0)


def pictured(**over: Any) -> ColaDLM:
    """Networks for the engine, which looks at no codec."""
    model = tiny_model()
    model.dit = tiny_dit(1, **{"img_channels": CHANNELS, "img_grid": [2, 3], **over})
    return model


def wanted(ids: Sequence[int], seed: int, **settings: Any) -> Request:
    return Request(tuple(ids), 0, RequestSettings(seed=seed, **settings), draws=LATENTS)


def about(ids: Sequence[int], tokens: int, seed: int, **settings: Any) -> Request:
    picture = torch.randn(LATENTS, CHANNELS, generator=GENERATOR)
    return Request(tuple(ids), tokens, RequestSettings(seed=seed, **settings), picture=picture)


@torch.no_grad()
def by_hand(model: ColaDLM, own: Request) -> list[Tensor]:
    """The latents of a request's blocks from the readable loop."""
    settings, device = own.settings, torch.device("cpu")
    (latents,) = encode(model.vae, [own.ids], 0)
    guidance = [settings.guidance]
    if own.draws:
        noise = sample_noise(settings.seed, (LATENTS, CHANNELS), device)(0, 0)
        return [list(draw_latents(model.dit, [latents], noise[None], guidance, settings))[-1][0][0]]
    assert own.picture is not None
    contexts, blocks = show(model.dit, [latents], own.picture[None]), list[Tensor]()
    draw = sample_noise(settings.seed, (BLOCK, 8), device)
    for number in range(-(-own.new_tokens // BLOCK)):
        *_, (z, _) = describe_block(model.dit, contexts, draw(number, 0)[None], guidance, settings)
        append_block(model.dit, contexts, z)
        blocks.append(z[0])
    return blocks


def spelled(model: ColaDLM, blocks: list[Tensor]) -> list[list[int]]:
    """The likeliest tokens of blocks, whose decoder has seen neither prompt nor picture."""
    cache = KVCache()
    return [model.vae.decode(block, [BLOCK], [cache]).argmax(-1).tolist() for block in blocks]


def generated(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[Tensor], list[list[int]]]]:
    made: dict[int, tuple[list[Tensor], list[list[int]]]] = {id(own): ([], []) for own in requests}
    for own in requests:
        engine.submit(own)
    while engine.busy:
        for _ in engine.next_block():
            pass
        for slot in engine.news:
            assert slot.error is None, slot.error
            latents, ids = made[id(slot.request)]
            if slot.drawn is not None:
                latents.append(slot.drawn[:, :CHANNELS])
                assert not slot.drawn[:, CHANNELS:].any()
            else:
                assert slot.block is not None
                latents.append(slot.block.latents)
                ids.append(slot.ids)
            if slot.done:
                engine.leave(slot)
    assert engine.regions.free == engine.regions.capacity
    return [made[id(own)] for own in requests]


REQUESTS = [
    wanted(range(3, 12), 1, steps=3),
    request(tiny_model(), range(9), 10, 2, steps=5),
    about([4, 5], 9, 3, steps=4, guidance=2.0),
    about([4, 5], 9, 3, steps=4, guidance=2.0, guidance_against="latents"),
    wanted([], 4, steps=3, guidance=3.0, guidance_against="latents"),
    wanted([], 4, steps=6, guidance=3.0),
    wanted([7], 5, steps=5, solver="heun", schedule="front-loaded", guidance=1.0),
    about([], 5, 6, steps=2, solver="ab2", guidance=1.0),
    request(tiny_model(), [], 6, 7, steps=2),
    about(range(9), 4, 8, steps=3, guidance_cap=1.0, guidance_rescale=0.5),
    wanted(range(4), 9, steps=4, guidance_cap=0.7, guidance_rescale=0.3, guidance_interval=(0.2, 0.9)),
]


OVERS: list[dict[str, Any]] = [
    {},
    {"prediction": "z0"},
    {"prediction": "z0", "dual_layers": 1},
    {"dual_layers": 2, "img_axial": True},
    {"prediction": "z0", "img_axial": True},
    {"self_conditioning": True},
]
ENGINES: list[dict[str, int]] = [{}, {"slots": 3}, {"bucket": 16}]
ROUNDING = 1e-5
"""Of the largest number of a block, in float32."""


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is computed in float32 otherwise, in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(kernels, "ONEDNN", False)  # It has no products in float64.
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    dit._timestep_frequencies.cache_clear()
    yield
    torch.set_default_dtype(usual)
    dit._timestep_frequencies.cache_clear()


def assert_near(one: Tensor, other: Tensor, tolerance: float = ROUNDING) -> None:
    """Numbers differ by no more than a share of the largest one."""
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def assert_as_in_the_loop(model: ColaDLM, engine: Engine, requests: list[Request], tolerance: float) -> None:
    for own, (latents, ids) in zip(requests, generated(engine, requests), strict=True):
        if own.draws or own.picture is not None:
            expected = by_hand(model, own)
            if own.picture is not None:
                assert ids == spelled(model, expected)
        else:
            blocks = reference(model, own)
            expected = [block for block, _ in blocks]
            assert ids == [spelt for _, spelt in blocks]
        assert len(latents) == len(expected)
        for one, other in zip(latents, expected, strict=True):
            assert_near(one, other, tolerance)


@pytest.mark.parametrize("over", OVERS, ids=str)
def test_pictures_and_texts_in_one_session_are_those_of_the_readable_loop(over: dict[str, Any]) -> None:
    model = pictured(**over)
    for kind in ENGINES:
        engine = Engine(model.vae, model.dit, capacity=200, **kind)
        assert_as_in_the_loop(model, engine, REQUESTS, ROUNDING)


@pytest.mark.parametrize("over", OVERS, ids=str)
def test_what_differs_is_rounding_alone(over: dict[str, Any], doubled: None) -> None:
    model = pictured(**over)
    requests = [
        own if own.picture is None else replace(own, picture=own.picture.double()) for own in REQUESTS
    ]
    for kind in ENGINES:
        engine = Engine(model.vae, model.dit, capacity=200, **kind)
        assert_as_in_the_loop(model, engine, requests, 1e-12)


def test_what_fails_for_one_picture_fails_for_no_other() -> None:
    model = pictured()
    engine = Engine(model.vae, model.dit, capacity=100)

    def none(block: int, candidate: int = 0) -> Tensor:
        raise ZeroDivisionError("no noise today")

    broken = replace(wanted([3], 1, steps=2), noise=none)
    shown = replace(about([], 4, 2, steps=2), picture=torch.zeros(5, CHANNELS))  # One latent is missing.
    whole = wanted([3], 1, steps=2)
    for own in (broken, shown, whole):
        engine.submit(own)
    for _ in engine.next_block():
        pass
    errors = {slot.request.settings.seed: slot.error for slot in engine.news if slot.request is not whole}
    assert "no noise today" in str(errors[1])
    assert "its picture cannot be read" in str(errors[2])
    (done,) = [slot for slot in engine.news if slot.request is whole]
    assert done.drawn is not None
    assert_near(done.drawn[:, :CHANNELS], by_hand(model, whole)[0])


# --- the model ---------------------------------------------------------------------------------

CONFIG = CodecConfig(size=32, patch=16, channels=8, drawing={"steps": 3}, describing={"steps": 2})


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    pictures = np.stack([open_source("shapes:").pair(number).picture for number in range(60)])
    network = tiny_dit(1, img_channels=8, img_grid=[2, 2], prediction="z0")
    return ColaDLM(tiny_vae(pad_token_id=0), network, image=fit([pictures], CONFIG), origin="tiny")


def test_drawings_are_pixels_of_latents_and_do_not_depend_on_the_batch(model: ColaDLM) -> None:
    captions = [[3, 4, 5], [], [6]]
    drawn = model.draw(captions, seed=5, guidance=2.0)
    for number, (caption, picture) in enumerate(zip(captions, drawn, strict=True)):
        (alone,) = model.draw([caption], seed=5 + number, guidance=2.0)
        np.testing.assert_array_equal(alone, picture)
        assert model.image is not None
        settings = RequestSettings(
            seed=5 + number, steps=3, guidance=2.0, solver="ab2", schedule="front-loaded"
        )
        with torch.no_grad():
            (latents,) = encode(model.vae, [caption], 0)
            noise = sample_noise(settings.seed, (4, 8), torch.device("cpu"))(0, 0)
            *_, (z, _) = draw_latents(model.dit, [latents], noise[None], [2.0], settings)
        expected = model.image.decode(z)[0].numpy()
        assert (
            abs(picture.astype(int) - expected.astype(int)).max() <= 1
        )  # What is rounded may differ by one.
    assert drawn[0].shape == (32, 32, 3)
    assert not np.array_equal(*model.draw([[3], [3]], seed=[1, 2]))
    np.testing.assert_array_equal(*model.draw([[3], [3]], seed=[1, 1]))


def test_what_texts_are_guided_against_is_not_what_drawings_are(model: ColaDLM) -> None:
    plain = model.draw([[1, 2, 3]], seed=1, steps=3)[0]
    latents = model.draw([[1, 2, 3]], seed=1, steps=3, guidance_against="latents")[0]
    kept, model.generation = model.generation, {"guidance": 3.0, "guidance_against": "latents"}
    try:
        assert np.array_equal(model.draw([[1, 2, 3]], seed=1, steps=3)[0], plain)
    finally:
        model.generation = kept
    assert not np.array_equal(latents, plain)


@pytest.mark.parametrize("channels", [8, 5])
def test_who_watches_a_drawing_sees_every_step_as_the_readable_loop_takes_it(channels: int) -> None:
    pictures = np.stack([open_source("shapes:").pair(number).picture for number in range(60)])
    network = tiny_dit(1, img_channels=channels, img_grid=[2, 2], prediction="z0")
    codec = fit([pictures], replace(CONFIG, channels=channels))
    model = ColaDLM(tiny_vae(pad_token_id=0), network, image=codec)
    captions: list[list[int]] = [[3, 4, 5, 6, 7, 8], [], [6]]
    asked: dict[str, Any] = {"seed": 5, "guidance": 2.0, "steps": 4, "solver": "ab2"}
    watched, streamed, done = list[TransportStep](), list[TransportStep](), list[tuple[int, int]]()
    drawn = model.draw(
        captions, callback=watched.append, progress=lambda count, whole: done.append((count, whole)), **asked
    )
    chunks = list(model.stream_drawing(captions, callback=streamed.append, **asked))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [(step.step, step.steps) for step in watched] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for number, (caption, picture) in enumerate(zip(captions, drawn, strict=True)):
        settings = RequestSettings(**{**asked, "seed": 5 + number, "schedule": "front-loaded"})
        with torch.no_grad():
            (latents,) = encode(model.vae, [caption], 0)
            noise = sample_noise(5 + number, (4, channels), torch.device("cpu"))(0, 0)
            steps = list(draw_latents(model.dit, [latents], noise[None], [2.0], settings))
        guesses = [chunk.picture for chunk in chunks if (chunk.index, chunk.step is None) == (number, False)]
        assert len(steps) == len(watched) == len(streamed) == len(guesses) == 4
        for (z, z0), step, again, guess in zip(steps, watched, streamed, guesses, strict=True):
            assert step.latents.shape == step.z0.shape == (3, 4, 8)
            for own, expected in ((step.latents, z), (step.z0, z0)):
                assert_near(own[number, :, :channels], expected[0])
                assert not own[number, :, channels:].any()  # What a picture is widened by.
            assert torch.equal(step.latents, again.latents)
            assert torch.equal(step.z0, again.z0)
            np.testing.assert_array_equal(guess, codec.decode(step.z0[number : number + 1, :, :channels])[0])
        last = watched[-1].latents[number : number + 1, :, :channels]
        np.testing.assert_array_equal(picture, codec.decode(last)[0].numpy())


def test_a_difference_to_it_draws_too(model: ColaDLM, tmp_path: Path) -> None:
    model.save(tmp_path / "base")
    other = load_cola(tmp_path / "base")
    with torch.no_grad():
        for parameter in other.dit.parameters():
            if parameter.ndim == 1:
                parameter += 0.02
    save_difference(other, model, str(tmp_path / "base"), tmp_path / "small", 1)
    again, *drawn = (one.draw([[3]], seed=1)[0] for one in (load_cola(tmp_path / "small"), other, model))
    assert abs(again.astype(int) - drawn[0].astype(int)).max() <= 1  # Of rounding.
    assert not np.array_equal(*drawn)


def test_a_drawing_forms_step_by_step_and_the_last_guess_is_it(model: ColaDLM) -> None:
    chunks = list(model.stream_drawing([[3, 4]], seed=1, steps=4))
    assert [(chunk.step, chunk.steps) for chunk in chunks] == [(1, 4), (2, 4), (3, 4), (4, 4), (None, None)]
    assert all(chunk.picture is not None and chunk.picture.shape == (32, 32, 3) for chunk in chunks)
    last = chunks[-1]
    assert last.completion is not None
    assert (last.finish_reason, last.completion.finish_reason) == ("drawn", "drawn")
    np.testing.assert_array_equal(last.picture, model.draw([3, 4], seed=1, steps=4)[0])
    np.testing.assert_array_equal(last.picture, last.completion.picture)
    guess = chunks[-2].picture  # Euler's last step goes where the guess is, ab2's near it.
    assert guess is not None
    assert [chunk.step for chunk in model.stream_drawing([[3]], guesses=False)] == [None]


def test_descriptions_do_not_depend_on_the_batch_and_files_are_taken(model: ColaDLM, tmp_path: Path) -> None:
    from colada.pictures.show import png

    pictures = [open_source("shapes:").pair(number).picture for number in range(3)]
    answers = model.describe(pictures, 9, prompt=[4, 5], seed=3, end_ids=())
    assert [len(answer.tokens) for answer in answers] == [9, 9, 9]
    for number, picture in enumerate(pictures):
        assert model.describe(picture, 9, prompt=[4, 5], seed=3 + number, end_ids=()) == [answers[number]]
    (tmp_path / "own.png").write_bytes(png(pictures[0], 1))
    assert model.describe(tmp_path / "own.png", 9, prompt=[4, 5], seed=3, end_ids=()) == answers[:1]
    np.testing.assert_equal(model.describe(np.stack(pictures), 9, prompt=[4, 5], seed=3, end_ids=()), answers)


@pytest.mark.filterwarnings("always::colada.errors.ColadaWarning")
def test_what_was_changed_in_a_file_that_is_described_is_said_once_a_picture(
    model: ColaDLM, tmp_path: Path
) -> None:
    from colada.pictures.show import png

    picture = open_source("shapes:").pair(0).picture
    paths = [tmp_path / name for name in ("own.png", "large.png", "wide.png")]
    paths[0].write_bytes(png(picture, 1))
    paths[1].write_bytes(png(picture, 3))
    paths[2].write_bytes(png(np.pad(picture, ((0, 0), (4, 4), (0, 0))), 1))
    scaled, cropped = "scaled from 96 × 96 to 32 × 32", "cropped from 40 × 32 to its middle 32 × 32"
    expected = [f"{paths[1]}: {scaled}", f"{paths[2]}: {cropped}"]
    with pytest.warns(ColadaWarning) as notes:
        answers = model.describe(paths, 9, prompt=[4, 5], seed=3)
    assert [str(note.message) for note in notes] == expected
    assert answers == model.describe([picture] * 3, 9, prompt=[4, 5], seed=3)
    with pytest.warns(ColadaWarning) as notes:
        model.describing(str(paths[2]), 9)
    assert [str(note.message) for note in notes] == expected[1:]
    assert notes[0].filename == __file__


def test_one_session_draws_describes_and_writes(model: ColaDLM) -> None:
    picture = open_source("shapes:").pair(0).picture
    session = model.session(capacity=200)
    session.submit([1, 2, 3], 6, seed=1, steps=2)
    session.add(*model.drawing([3, 4], seed=2))
    session.add(*model.describing(picture, 6, seed=3, end_ids=()))
    done = {chunk.index: chunk.completion for chunk in session.chunks() if chunk.completion is not None}
    assert done[0] == model.generate([[1, 2, 3]], 6, seed=1, steps=2)[0]
    assert done[1] is not None
    np.testing.assert_allclose(done[1].picture, model.draw([3, 4], seed=2)[0], rtol=0, atol=1)
    assert done[2] == model.describe(picture, 6, seed=3, end_ids=())[0]


def test_a_model_is_saved_with_its_pictures_and_loads_the_same(model: ColaDLM, tmp_path: Path) -> None:
    import colada

    model.save(tmp_path / "model")
    again = colada.load(tmp_path / "model")
    assert isinstance(again, ColaDLM)
    np.testing.assert_array_equal(again.draw([3], seed=1)[0], model.draw([3], seed=1)[0])
    (tmp_path / "model" / "cola_image" / "model.safetensors").unlink()
    with pytest.raises(ColadaError, match="cola_image"):
        colada.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.draw([[3]], candidates=2), "candidates=2 of a picture, expected 1"),
        (lambda model: model.draw([[99]]), "99"),
        (lambda model: model.draw([[3]], steps=0), "steps=0"),
        (lambda model: model.draw([[3]], batch=0), "batch=0"),
        (lambda model: model.draw("a circle"), "no tokenizer"),
        (
            lambda model: model.describe([np.zeros((8, 8, 3), np.uint8)]),
            r"\(8, 8, 3\) and type uint8, expected",
        ),
        (lambda model: model.describe([np.zeros((32, 32, 3))]), "type float64, expected uint8"),
        (lambda model: model.describe([7]), "picture 7, expected a file"),
        (lambda model: model.describe(7), "pictures=7, expected a file"),
        (lambda model: model.describe([np.zeros((32, 32, 3), np.uint8)], prompt=7), "7"),
        (lambda model: model.describe(["/nowhere.png"]), "/nowhere.png"),
        (lambda model: tiny_model().draw([[3]]), "has no pictures: img_channels=0"),
        (lambda model: tiny_model().describe([np.zeros((32, 32, 3), np.uint8)]), "has no pictures"),
        (lambda model: tiny_model().drawing([3]), "has no pictures"),
    ],
)
def test_what_is_refused_in_one_line(model: ColaDLM, ask: Any, message: str) -> None:
    with pytest.raises(ColadaError, match=message) as raised:
        ask(model)
    assert "\n" not in str(raised.value)


def test_a_picture_that_fails_says_so_and_the_others_are_there(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colada.generate.canvas import Canvas

    whole, looked = Canvas.look, []

    def look(self: Canvas, latents: Tensor | None) -> Any:
        looked.append(latents)
        if len(looked) == 1:
            raise ColadaError("no colours left")
        return whole(self, latents)

    monkeypatch.setattr(Canvas, "look", look)
    with pytest.raises(GenerationError, match=r"1 of 2 samples failed.*no colours left") as raised:
        model.draw([[3], [4]])
    assert [one is None for one in raised.value.completions] == [True, False]
