"""How likely texts are under a model, whichever kind it is: the one way in for everything that asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from colada.evaluation.likelihood import likelihood
from colada.evaluation.texts import Kind, TextScore
from colada.model import ColaDLM
from colada.settings import Prompt


def kind(model: ColaDLM) -> Kind:
    """Return what :func:`measure` finds of a model: "bound", or "exact"."""
    return "bound"


def measure(
    model: ColaDLM,
    texts: Sequence[Prompt],
    given: Sequence[Prompt] | None = None,
    *,
    samples: int = 1,
    at: float = 0.6,
    steps: int = 32,
    seed: int | Sequence[int] = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[TextScore]:
    """Return log p(text | given) of each text, or a lower bound on it, see :func:`kind`.

    The tokens scored are those of the text alone, after those of what is given.

    Args:
        model: under whose distribution; see :mod:`colada.evaluation.likelihood` for what a bound is of.
        texts: texts, or lists of ids; none empty.
        given: what each of them follows; an empty one is none, as is None for all.
        samples: K of a bound; what is exact needs none.
        at, steps: of Cola DLM's bound, see :func:`~colada.evaluation.likelihood.likelihood`.
        seed: of a bound's randomness: one for all, or one each.
        batch: texts computed together; changes no result.
        progress: called after every batch with how many texts are done, and of how many.

    Returns: a score a text, in order; ``origin`` is empty, ``bytes`` 0 where a text is given as ids.

    Raises:
        ColadaError: naming the argument at fault, or for a model that has no likelihood.
    """
    # The place to tell kinds of models apart.
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
