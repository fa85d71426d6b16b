"""Faults of evaluating and of studies, by kind: what is wrong is one line, and nothing is lost or hidden."""

from __future__ import annotations

import pytest

from colada.baselines.config import DecoderConfig
from colada.baselines.decoder import Decoder
from colada.baselines.load import MODELS
from colada.errors import ColadaError
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
