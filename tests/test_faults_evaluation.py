"""Faults of evaluating and of studies, by kind: what is wrong is one line, and nothing is lost or hidden."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colada import layers
from colada.baselines.config import DecoderConfig
from colada.baselines.decoder import Decoder
from colada.baselines.load import MODELS
from colada.errors import ColadaError
from colada.evaluation import likelihood as likelihood_room
from colada.evaluation.likelihood import likelihood
from colada.evaluation.measure import measure
from colada.language_model import LanguageModel
from colada.settings import TextRequest
from helpers import tiny_model

# --- one batch loop ------------------------------------------------------------------------------

PROMPTS = [[], [7, 3, 9], [4] * 17, [23, 42, 1, 2, 3, 4, 5, 6, 7], [11, 12]]
LENGTHS = [9, 3, 14, 1, 6]


def models() -> dict[str, LanguageModel]:
    config = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 40, "vocab_size": 50, "block_size": 4}
    decoders = {
        arch: MODELS[arch](_decoder(DecoderConfig(objective=arch, **config)))  # type: ignore[arg-type]
        for arch in ("ar", "llada")
    }
    return {"cola": tiny_model(), **decoders}


def _decoder(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config)
    decoder.init_weights()
    return decoder


@pytest.mark.parametrize("arch", ["cola", "ar", "llada"])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_texts_that_take_turns_are_those_written_alone(arch: str, batch: int) -> None:
    model = models()[arch]
    requests = [
        TextRequest(prompt, length, {"seed": 5 + number, "temperature": 1.0, "end_ids": ()})
        for number, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]
    found = dict(model.complete(requests, batch))
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, (prompt, length, settings) in enumerate(requests):
        (alone,) = model.generate([prompt], length, **settings)
        assert found[number] == alone


def test_a_text_joins_as_soon_as_another_leaves() -> None:
    """Two short texts are finished, one after the other, beside one long text."""
    requests = [TextRequest([], length, {"steps": 1}) for length in (24, 4, 4, 4)]
    order = [number for number, _ in tiny_model().complete(requests, batch=2)]
    assert order == [1, 2, 3, 0]


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    for model in models().values():
        with pytest.raises(ColadaError, match="batch="):
            model.complete([TextRequest([1], 1, {})], batch)


def test_one_bad_request_is_found_before_anything_is_written() -> None:
    for model in models().values():
        with pytest.raises(ColadaError, match="prompt id 99"):
            model.complete([TextRequest([1], 4, {}), TextRequest([99], 4, {})], 1)


# --- long texts ----------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor) and not part.is_mkldnn:
                # What is expanded takes no memory.
                own = part.untyped_storage().nbytes() // max(1, part.element_size())
                self.numbers = max(self.numbers, own)
        return out


def largest(model: LanguageModel, tokens: int) -> int:
    text = [1 + number % 40 for number in range(tokens)]
    with LargestTensor() as counted:
        measure(model, [text], steps=1, samples=1)
    return counted.numbers


@pytest.mark.parametrize("arch", ["cola", "ar"])
def test_memory_of_a_likelihood_is_linear_in_the_length(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood_room, "EXACT_NUMBERS", 0)
    monkeypatch.setattr(likelihood_room, "GROUP_LATENTS", 64)
    model = models()[arch]
    short, long = largest(model, 768), largest(model, 1536)
    assert long <= 2.1 * short
    assert long < 1536**2 / 4


def test_a_text_that_no_memory_holds_is_refused_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood_room, "memory_of", lambda device: 2**20)
    with pytest.raises(ColadaError, match=r"a text of 4,000 tokens needs 0\.0 GiB for its keys"):
        likelihood(tiny_model(), [[1], [2] * 4000])


def test_groups_of_blocks_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text and probes, in groups of one block, of two, and in one."""
    model, text = tiny_model(), [1 + number % 40 for number in range(30)]
    found = []
    for latents in (4, 8, 128):
        monkeypatch.setattr(likelihood_room, "GROUP_LATENTS", latents)
        found.append(likelihood(model, [text], [[3] * 9], steps=2).texts[0])
    for other in found[1:]:
        assert other.bound == pytest.approx(found[0].bound, rel=1e-5)
        assert other.reconstruction == pytest.approx(found[0].reconstruction, rel=1e-5)


def test_no_compiled_kernel_is_used_so_that_several_samples_may_follow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiled kernel gives its buffers away in the first backward pass, and an exact trace has many."""

    def compiled(*arguments: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(layers, "_flex", compiled)
    model = tiny_model()
    one, several = (likelihood(model, [[1, 2, 3]], samples=samples, steps=1) for samples in (1, 3))
    assert one.samples == 1
    assert several.samples == 3


def _append(said: list[tuple[int, int]], done: int, total: int) -> None:
    said.append((done, total))


def test_progress_rises_to_all_tokens() -> None:
    for arch, model in models().items():
        said: list[tuple[int, int]] = []
        measure(model, [[1] * 40, [2] * 9, [3] * 9], steps=2, progress=partial(_append, said))
        assert said == sorted(said), arch
        assert said[-1] == (58, 58)
        assert all(total == 58 for _, total in said)
        assert arch != "cola" or len(said) > 10
