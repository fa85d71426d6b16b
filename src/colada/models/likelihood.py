"""How likely texts are under a model, whichever kind it is: the one way in for everything that asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from colada.checks import require_count, require_function
from colada.errors import ColadaError, shown
from colada.generate.settings import Prompt, check_settings, several
from colada.models.base import ARCHITECTURES, LanguageModel, require_kind
from colada.models.bound import SETTINGS, LikelihoodKind, TextScore, check_bound
from colada.models.cola import ColaDLM
from colada.models.cola_likelihood import cola_bounds
from colada.models.decoder import DecoderLM
from colada.models.decoder_likelihood import decoder_likelihoods


def kind(model: LanguageModel) -> LikelihoodKind:
    """Return what :func:`measure` finds of a model: "bound", or "exact"."""
    return "exact" if model.arch == "ar" else "bound"


def bound_settings(model: LanguageModel, **settings: Any) -> dict[str, Any]:
    """Return the settings of a model's likelihood that count, for :func:`measure`.

    Args:
        model: AR has none, LLaDA ``samples``, Cola DLM all.
        settings: ``samples``, ``at`` and ``steps`` of :func:`measure`; None is the default.

    Raises:
        ColadaError: for one that is out of range, or that this kind of model does not have.
    """
    defaults = SETTINGS[model.arch]
    chosen = {name: value for name, value in settings.items() if value is not None}
    for name, value in chosen.items():
        if name not in defaults:
            what = ARCHITECTURES[model.arch]
            raise ColadaError(f"{name}={value!r}, but the likelihood of {what} has no {name}")
    check_bound(**settings)
    return defaults | chosen


def measure(
    model: LanguageModel,
    texts: Sequence[Prompt],
    contexts: Sequence[Prompt] | None = None,
    *,
    samples: int | None = None,
    at: float = 0.6,
    steps: int = 16,
    seed: int | Sequence[int] = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[TextScore]:
    """Return log p(text | context) of each text, or a lower bound on it, see :func:`kind`.

    The tokens scored are those of the text alone, after those of its context.

    Args:
        model: under whose distribution; see :mod:`colada.models.cola_likelihood` and
            :mod:`colada.models.decoder_likelihood` for what a bound is of.
        texts: texts, or lists of ids; none empty.
        contexts: what each of them follows; an empty one is none, as is None for all.
        samples: K of a bound, of :data:`~colada.models.bound.SETTINGS` if None: importance-weighted for Cola
            DLM, masks drawn for LLaDA; what is exact needs none.
        at: of Cola DLM's bound: a = t / T of the latents z_a that it is over.
        steps: of Cola DLM's flow from a to 1 (Heun, two evaluations each), and half as many of AB2 to 0.
        seed: of a bound's randomness: one for all, or one each; a text's is the same in any batch.
        batch: texts computed together; changes no result.
        progress: called every now and then with how many tokens are done, and of how many.

    Returns: a score a text, in order.

    Raises:
        ColadaError: naming the argument at fault, an empty text, or a model that has no likelihood.
    """
    require_kind("model", model, LanguageModel)
    texts, contexts = several(texts), [[] for _ in texts] if contexts is None else several(contexts)
    check_bound(samples, at, steps)
    samples = require_count("samples", SETTINGS[model.arch].get("samples", 1) if samples is None else samples)
    steps, batch = require_count("steps", steps), require_count("batch", batch)
    seed = check_settings({"seed": seed}).get("seed", 0)
    require_function("progress", progress)
    if len(contexts) != len(texts):
        raise ColadaError(f"{len(contexts)} contexts for {len(texts)} texts, expected one each")
    streams: list[tuple[int, ...]] = (
        [(seed, number) for number in range(len(texts))]
        if isinstance(seed, int)
        else [(number,) for number in seed]
    )
    if len(streams) != len(texts):
        raise ColadaError(f"{len(streams)} values of seed for {len(texts)} texts, expected one, or one each")
    if isinstance(model, ColaDLM) and model.dit.config.distilled is not None:
        raise ColadaError("this model is distilled: its prior is no flow, and has no likelihood")
    ids, context_ids = [model.ids(text) for text in texts], [model.ids(context) for context in contexts]
    for number, token_ids in enumerate(ids):
        if not token_ids:
            raise ColadaError(f"text {number} has no tokens")
    sizes = [len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0 for text in texts]
    if isinstance(model, DecoderLM):
        bounds = decoder_likelihoods(model, context_ids, ids, streams, samples, batch, progress)
        parts: list[dict[str, float]] = [{} for _ in bounds]
    elif isinstance(model, ColaDLM):
        bounds, parts = cola_bounds(model, context_ids, ids, streams, samples, at, steps, batch, progress)
    else:
        raise ColadaError(f"{model.origin or 'the model'} ({model.arch}) has no likelihood")
    return list(map(TextScore, map(len, ids), sizes, bounds, parts))


def nats_per_token(judge: LanguageModel, texts: Sequence[str], batch: int = 64) -> list[float]:
    """Return -log p of each text under a judge divided by its tokens; log of the vocabulary for no token.

    What a bound draws is the same for every text: its value does not depend on the texts beside it.

    Raises:
        ColadaError: as :func:`measure`; if the judge has no tokenizer, or a value is not finite.
    """
    if judge.tokenizer is None:
        raise ColadaError(f"{judge.origin or 'this model'} has no tokenizer.json, and it judges texts")
    ids = [judge.tokenizer.encode(text) for text in texts]
    some = [of_text for of_text in ids if of_text]
    scores = iter(measure(judge, some, seed=[0] * len(some), batch=batch) if some else ())
    blind, nats = math.log(judge.tokenizer.vocab_size), list[float]()
    for text, of_text in zip(texts, ids, strict=True):
        nats.append(-next(scores).log_likelihood / len(of_text) if of_text else blind)
        if not math.isfinite(nats[-1]):
            raise ColadaError(f"{judge.origin or 'the judge'}: the likelihood of {shown(text)} is not finite")
    return nats
