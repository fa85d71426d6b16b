"""How likely texts are under a model, whichever kind it is: the one way in for everything that asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from colada.errors import ColadaError
from colada.evaluate.texts import Kind, TextScore, check_bound
from colada.generate.settings import Prompt, several
from colada.models.base import ARCHITECTURES, LanguageModel, require_kind
from colada.models.cola import ColaDLM
from colada.models.decoder import DecoderLM
from colada.models.decoder_likelihood import log_likelihood
from colada.models.likelihood import likelihood

SAMPLES = {"cola": 1, "ar": 1, "llada": 32}
"""By architecture, how many samples of a bound are drawn unless told otherwise."""


def kind(model: LanguageModel) -> Kind:
    """Return what :func:`measure` finds of a model: "bound", or "exact"."""
    return "exact" if model.arch == "ar" else "bound"


def bound_settings(
    model: LanguageModel, *, samples: int | None, at: float | None, steps: int | None
) -> dict[str, Any]:
    """Return the settings of a model's likelihood that count, for :func:`measure`; None is the default.

    Args:
        model: AR has none, LLaDA ``samples``, Cola DLM all.
        samples, at, steps: see :func:`measure`.

    Raises:
        ColadaError: for one that is out of range, or that this kind of model does not have.
    """
    defaults = {"samples": SAMPLES[model.arch], "at": 0.6, "steps": 16}
    kept = {"cola": ("samples", "at", "steps"), "llada": ("samples",), "ar": ()}[model.arch]
    for name, value in {"samples": samples, "at": at, "steps": steps}.items():
        if value is None:
            continue
        if name not in kept:
            what = ARCHITECTURES[model.arch]
            raise ColadaError(f"{name}={value!r}, but the likelihood of {what} has no {name}")
        defaults[name] = value
    check_bound(samples, at, steps)
    return {name: defaults[name] for name in kept}


def measure(
    model: LanguageModel,
    texts: Sequence[Prompt],
    given: Sequence[Prompt] | None = None,
    *,
    samples: int | None = None,
    at: float = 0.6,
    steps: int = 16,
    seed: int | Sequence[int] = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[TextScore]:
    """Return log p(text | given) of each text, or a lower bound on it, see :func:`kind`.

    The tokens scored are those of the text alone, after those of what is given.

    Args:
        model: under whose distribution; see :mod:`colada.models.likelihood` for what a bound is of.
        texts: texts, or lists of ids; none empty.
        given: what each of them follows; an empty one is none, as is None for all.
        samples: K of a bound, of :data:`SAMPLES` if None: importance-weighted for Cola DLM, masks drawn for
            LLaDA; what is exact needs none.
        at, steps: of Cola DLM's bound, see :func:`~colada.models.likelihood.likelihood`.
        seed: of a bound's randomness: one for all, or one each.
        batch: texts computed together; changes no result.
        progress: called every now and then with how many tokens are done, and of how many.

    Returns: a score a text, in order; ``origin`` is empty, ``bytes`` 0 where a text is given as ids.

    Raises:
        ColadaError: naming the argument at fault, or for a model that has no likelihood.
    """
    require_kind("model", model, LanguageModel)
    texts, given = several(texts), None if given is None else several(given)
    samples = SAMPLES[model.arch] if samples is None else samples
    if isinstance(model, DecoderLM):
        return _decoder(model, texts, given, samples, seed, batch, progress)
    if not isinstance(model, ColaDLM):
        raise ColadaError(f"{model.origin or 'the model'} ({model.arch}) has no likelihood")
    found = likelihood(
        model, texts, given, samples=samples, at=at, steps=steps, seed=seed, batch=batch, progress=progress
    )
    return [
        TextScore(
            "",
            own.tokens,
            own.bytes,
            own.bound,
            {"reconstruction": own.reconstruction, "prior": own.prior, "entropy": own.entropy},
        )
        for own in found.texts
    ]


def _decoder(
    model: DecoderLM,
    texts: Sequence[Prompt],
    given: Sequence[Prompt] | None,
    samples: int,
    seed: int | Sequence[int],
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> list[TextScore]:
    """Return what the baselines' own likelihood says."""
    contexts = [[] for _ in texts] if given is None else [model.ids(context) for context in given]
    if len(contexts) != len(texts):
        raise ColadaError(f"{len(contexts)} contexts for {len(texts)} texts, expected one each")
    ids = [model.ids(text) for text in texts]
    found = log_likelihood(model, contexts, ids, samples=samples, seed=seed, batch=batch, progress=progress)
    sizes = [len(text.encode()) if isinstance(text, str) else 0 for text in texts]
    return [
        TextScore("", len(own), size, value, {}) for own, size, value in zip(ids, sizes, found, strict=True)
    ]
