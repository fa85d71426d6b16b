import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import colada
from colada.errors import ColadaError
from colada.generate.engine.engine import Engine
from colada.generate.reference import TransportStep
from colada.models.cola import ColaDLM
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Chunk
from helpers import tiny_dit, tiny_model, tiny_vae

TEXTS = [
    "The fox saw the owl. The owl saw the fox, and the fox ran off to look under the bridge.",
    "Über die Brücke, é 🙂",
] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return tiny_model()


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> ColaDLM:
    """A model with a tokenizer; its text is nonsense, but of many different tokens."""
    return ColaDLM(tiny_vae(3, vocab_size=300), tiny_dit(4), tokenizer, generation={"steps": 3})


# --- finishing ----------------------------------------------------------------------------------


def test_an_end_id_ends_the_text_before_it(model: ColaDLM) -> None:
    free = model.generate([[5, 6]], 20, steps=2)[0]
    assert free.finish_reason == "length"
    for end in set(free.tokens):
        ended = model.generate([[5, 6]], 20, steps=2, end_ids=[end])[0]
        assert ended.tokens == free.tokens[: free.tokens.index(end)]
        assert ended.finish_reason == "end"


def test_the_tokenizers_end_tokens_are_the_default(speaker: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = speaker.tokenizer
    assert tokenizer is not None
    free = speaker.generate("The fox", 20, end_ids=())[0]
    monkeypatch.setattr(tokenizer, "end_ids", (free.tokens[7],))
    assert speaker.generate("The fox", 20)[0].tokens == free.tokens[: free.tokens.index(free.tokens[7])]
    assert speaker.generate("The fox", 20, end_ids=())[0] == free


def test_a_stop_string_cuts_the_text_wherever_it_lies(speaker: ColaDLM) -> None:
    free = speaker.generate("The fox", 30)[0]
    assert free.finish_reason == "length"
    assert len(set(free.text)) > 5
    tried = 0
    for start in range(0, len(free.text) - 4, 3):
        stop = free.text[start : start + 3]
        if "\ufffd" in stop:
            continue
        tried += 1
        stopped = speaker.generate("The fox", 30, stop=stop)[0]
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.finish_reason == "stop"
        assert free.tokens[: len(stopped.tokens)] == stopped.tokens
    assert tried > 3


def test_a_text_prompt_is_its_tokens(speaker: ColaDLM) -> None:
    tokenizer = speaker.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("The fox saw")
    assert speaker.generate("The fox saw", 9) == speaker.generate([ids], 9) == speaker.generate(ids, 9)
    both = speaker.generate(["The fox saw", ids], 9, seed=[4, 4])
    assert both[0] == both[1]
    assert both[0].text == tokenizer.decode(both[0].tokens)


# --- streaming ----------------------------------------------------------------------------------


def by_prompt(chunks: Iterator[Chunk], count: int) -> list[list[Chunk]]:
    collected: list[list[Chunk]] = [[] for _ in range(count)]
    for chunk in chunks:
        collected[chunk.index].append(chunk)
    return collected


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("stop", [(), (" ",), ("o", "he", "e f")])
def test_finished_chunks_add_up_to_what_generate_returns(
    speaker: ColaDLM, guesses: bool, stop: tuple[str, ...]
) -> None:
    prompts = ["", "The fox", "The owl saw the", "é"]
    whole = speaker.generate(prompts, 18, seed=7, stop=stop)
    streamed = by_prompt(speaker.stream(prompts, 18, seed=7, stop=stop, guesses=guesses), 4)
    for completion, chunks in zip(whole, streamed, strict=True):
        finished = [chunk for chunk in chunks if chunk.step is None]
        assert "".join(chunk.text for chunk in finished) == completion.text
        assert [chunk.block for chunk in finished] == list(range(len(finished)))
        reasons = [chunk.finish_reason for chunk in finished]
        assert reasons == [None] * (len(finished) - 1) + [completion.finish_reason]
        if completion.finish_reason == "length":
            tokens = tuple(itertools.chain.from_iterable(chunk.tokens for chunk in finished))
            assert tokens == completion.tokens


@pytest.mark.parametrize("patch", [1, 2])
def test_there_is_a_guess_a_step_and_the_last_is_the_blocks_own(patch: int) -> None:
    model = tiny_model(vae={"patch_size": patch})
    prompts = [[], [1, 2, 3], [9, 8, 7, 6, 5]]
    changed = 0
    for chunks in by_prompt(model.stream(prompts, 13, steps=4, guesses=True), 3):
        for block, group in itertools.groupby(chunks, key=lambda chunk: chunk.block):
            own = list(group)
            assert [chunk.step for chunk in own] == [1, 2, 3, 4, None]
            assert own[-2].tokens == own[-1].tokens
            assert all(chunk.finish_reason is None for chunk in own[:-1])
            assert block == own[0].block
            changed += own[0].tokens != own[-1].tokens
    assert changed > 0


def test_guesses_do_not_change_the_result(model: ColaDLM) -> None:
    plain = list(model.stream([[1, 2], [3] * 9], 9, steps=3))
    with_guesses = model.stream([[1, 2], [3] * 9], 9, steps=3, guesses=True)
    assert [chunk for chunk in with_guesses if chunk.step is None] == plain


def test_the_callback_sees_every_step_of_every_block(model: ColaDLM) -> None:
    seen: list[TransportStep] = []
    model.generate([[1], [2, 3, 4, 5, 6]], 9, steps=3, callback=seen.append)
    # Both samples need three blocks: 9 tokens after a tail of 1, four a block.
    assert [step.step for step in seen] == [1, 2, 3] * 3
    assert all(step.latents.shape == (2, 4, 8) for step in seen)


def test_arguments_are_checked_before_the_first_chunk_is_asked_for(model: ColaDLM) -> None:
    with pytest.raises(ColadaError, match="max_new_tokens"):
        model.stream([[1]], 0)


# --- what users get wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "tokens", "settings", "message"),
    [
        ([[1]], 4, {"temprature": 1.0}, "'temprature'.*did you mean 'temperature'"),
        ([[1]], 0, {}, "max_new_tokens=0"),
        ([[1]], -3, {}, "max_new_tokens=-3"),
        ([[1]], 4, {"steps": 0}, "steps=0"),
        ([[1]], 4, {"solver": "rk4"}, "solver='rk4'"),
        ([[1]], 4, {"schedule": "cosine"}, "schedule='cosine'"),
        ([[1]], 4, {"noise": "release"}, "noise='release'.*did you mean 'released'"),
        ([[1]], 4, {"seed": -1}, "seed=-1"),
        ([[1], [2]], 4, {"seed": [1, -2]}, "seed=-2"),
        ([[1], [2]], 4, {"seed": [1, 2, 3]}, "3 values of seed for 2 prompts"),
        ([[1], [2]], 4, {"guidance": [7.0]}, "1 values of guidance for 2 prompts"),
        ([[1]], 4, {"guidance": float("nan")}, "guidance=nan"),
        ([[1]], 4, {"guidance": "x"}, "guidance='x'"),
        ([[1]], 4, {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], 4, {"top_k": -1}, "top_k=-1"),
        ([[1]], 4, {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], 4, {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ([[1]], 4, {"stop": "x"}, "tokenizer"),
        ([[50]], 4, {}, "prompt id 50.*0 to 49"),
        ([[-1]], 4, {}, "prompt id -1"),
        ([[1.5]], 4, {}, "prompt id 1.5"),
        ("text", 4, {}, "tokenizer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    model: ColaDLM, prompts: Any, tokens: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ColadaError, match=message) as caught:
        model.generate(prompts, tokens, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "settings", "name"),
    [
        (2.5, {}, "max_new_tokens"),
        ("4", {}, "max_new_tokens"),
        (4, {"seed": 1.5}, "seed"),
        (4, {"steps": 2.5}, "steps"),
        (4, {"steps": "2"}, "steps"),
        (4, {"temperature": "hot"}, "temperature"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(
    model: ColaDLM, tokens: Any, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ColadaError, match=name):
        # One block is enough to tell; a generation that never ends should not hang the tests.
        next(iter(model.stream([[1]], tokens, **settings)))


def test_an_empty_stop_string_is_refused(speaker: ColaDLM) -> None:
    with pytest.raises(ColadaError, match="stop=''"):
        speaker.generate("The", 4, stop=["x", ""])


def test_none_means_the_models_own_setting(speaker: ColaDLM) -> None:
    steps: list[TransportStep] = []
    speaker.generate("The", 4, steps=None, guidance=None, seed=None, callback=steps.append)
    assert steps[0].steps == 3
    steps.clear()
    speaker.generate("The", 4, steps=5, callback=steps.append)
    assert steps[0].steps == 5


def test_no_prompts_give_no_completions(model: ColaDLM) -> None:
    assert model.generate([], 4) == []


def test_an_unknown_setting_of_a_model_is_refused() -> None:
    with pytest.raises(ColadaError, match=r"'stepz'.*did you mean 'steps'"):
        tiny_model(generation={"stepz": 3})


def test_parts_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ColadaError, match="block_size"):
        tiny_model(dit={"block_size": 2})
    with pytest.raises(ColadaError, match=r"300.*vocab_size=50"):
        ColaDLM(tiny_vae(), tiny_dit(), tokenizer)


def test_a_model_that_knows_no_padding_id_says_so() -> None:
    model = ColaDLM(tiny_vae(), tiny_dit())
    with pytest.raises(ColadaError, match="padding id"):
        model.generate([[1, 2]], 4, steps=1)
    assert len(model.generate([[]], 4, steps=1)[0].tokens) == 4


# --- tokens and latents -------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_a_text_has_one_latent_per_patch(patch: int) -> None:
    model = tiny_model(vae={"patch_size": patch})
    for count in range(9):
        latents = model.encode(list(range(1, count + 1)))
        assert latents.shape == ((count + patch - 1) // patch, 8)
        assert len(model.decode(latents)) == len(latents) * patch


def test_reconstruction_is_encode_decode_and_compare() -> None:
    for seed in range(3):
        vae = tiny_vae(seed, pad_token_id=0, scaling_factor=1.5)
        model = ColaDLM(vae, tiny_dit())
        ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
        with torch.no_grad():
            mean = vae.encode(torch.tensor([*ids, 0, 0]), [12]).mean[:10] * 1.5
            logits = vae.decode(mean, [10])
        expected = [int(row.argmax()) for row in logits]
        made = model.reconstruct(ids)
        assert list(made.tokens) == expected
        assert made.accuracy == sum(a == b for a, b in zip(ids, expected, strict=True)) / 10


def test_reconstruction_counts_the_share_of_tokens_it_gets_right(
    model: ColaDLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "decode", lambda latents: [7, 8, 0, 9])
    made = model.reconstruct([7, 8, 9])
    assert made.tokens == (7, 8, 0)
    assert made.accuracy == pytest.approx(2 / 3)
    with pytest.raises(ColadaError, match="nothing to reconstruct"):
        model.reconstruct([])


def test_latents_of_another_width_are_refused(model: ColaDLM) -> None:
    with pytest.raises(ColadaError, match=r"\(3, 9\)"):
        model.decode(torch.zeros(3, 9))


# --- infilling ----------------------------------------------------------------------------------


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[TransportStep]:
    """Every solver step that any engine takes."""
    taken: list[TransportStep] = []
    real = Engine.next_block

    def next_block(self: Engine) -> Iterator[TransportStep]:
        for step in real(self):
            taken.append(step)
            yield step

    monkeypatch.setattr(Engine, "next_block", next_block)
    return taken


@pytest.mark.parametrize(
    ("before", "hole", "after"), [(0, 1, 0), (5, 2, 4), (4, 4, 4), (6, 7, 3), (3, 1, 9), (0, 3, 2)]
)
def test_a_hole_is_filled_with_exactly_its_tokens_and_what_is_known_stays_pinned(
    model: ColaDLM, steps_taken: list[TransportStep], before: int, hole: int, after: int
) -> None:
    left, right = list(range(10, 10 + before)), list(range(30, 30 + after))
    made = model.infill(left, right, hole, steps=3, seed=2)
    assert len(made.tokens) == hole
    assert made.finish_reason == "length"

    ids = [*left, *[model.vae.config.mask_id] * hole, *right]
    padded = ids + [0] * (-len(ids) % 4)
    mean = model.vae.encode(torch.tensor(padded), [len(padded)]).mean
    start = before // 4 * 4
    blocks = (before + hole - 1) // 4 - before // 4 + 1
    assert len(steps_taken) == 3 * blocks
    for number, step in enumerate(steps_taken):
        for at in range(4):
            position = start + number // 3 * 4 + at
            known = position < before or before + hole <= position < len(ids)
            assert torch.allclose(step.latents[0, at], mean[position], atol=1e-5) == known


def test_what_follows_the_hole_in_its_last_block_matters_and_what_comes_later_does_not(
    model: ColaDLM, steps_taken: list[TransportStep]
) -> None:
    filled = []
    for right in ([20, 21, 22], [20, 9, 22], [20, 21, 3]):
        model.infill([1, 2, 3, 4, 5], right, 1, steps=2, seed=1)
        filled.append(steps_taken[-1].latents[0, 1])
    # Block 5..8 holds the hole and the first two tokens after it.
    assert not torch.allclose(filled[0], filled[1], atol=1e-3)
    torch.testing.assert_close(filled[0], filled[2])


def test_a_hole_must_fall_on_whole_latents() -> None:
    model = tiny_model(vae={"patch_size": 2})
    assert len(model.infill([1, 2], [3, 4, 5], 4, steps=1).tokens) == 4
    with pytest.raises(ColadaError, match="patch_size=2"):
        model.infill([1, 2, 3], [], 2)
    with pytest.raises(ColadaError, match="patch_size=2"):
        model.infill([1, 2], [], 3)


def test_infilling_refuses_bad_arguments_by_name(model: ColaDLM) -> None:
    with pytest.raises(ColadaError, match=r"(?<!new_)tokens=0"):
        model.infill([1], [2], 0)
    with pytest.raises(ColadaError, match="unknown generation setting 'guidanse'"):
        model.infill([1], [2], 2, guidanse=1.0)  # type: ignore[call-arg]


# --- saving and loading -------------------------------------------------------------------------


def test_a_saved_model_generates_the_same_when_loaded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    vae = {"vocab_size": 300, "patch_size": 2, "scaling_factor": 1.1}
    settings = {"steps": 3, "guidance": 2.5, "schedule": "front-loaded"}
    model = ColaDLM(tiny_vae(**vae), tiny_dit(prediction="z0"), tokenizer, generation=settings)
    expected = model.generate(["The fox", "", "The owl saw"], 15, seed=3)
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model")
    assert loaded.generation == settings
    assert loaded.generate(["The fox", "", "The owl saw"], 15, seed=3) == expected
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == settings
    for name, tensor in model.dit.state_dict().items():
        assert torch.equal(loaded.dit.state_dict()[name], tensor)
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor)


def test_a_model_without_a_tokenizer_saves_and_loads(tmp_path: Path, model: ColaDLM) -> None:
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model")
    assert loaded.tokenizer is None
    assert loaded.generate([[1, 2]], 6, steps=2) == model.generate([[1, 2]], 6, steps=2)


def test_weights_can_be_loaded_in_another_type(tmp_path: Path, model: ColaDLM) -> None:
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.dit.parameters()} == {torch.bfloat16}
    assert len(loaded.generate([[1, 2]], 6, steps=2)[0].tokens) == 6
