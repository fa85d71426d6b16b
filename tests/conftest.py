"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported. Two processes share the tests, so each has one thread; so has what they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from colada.models.cola import ColaDLM
from colada.text.tokenizer import Tokenizer
from faults import TEXTS
from helpers import tiny_dit, tiny_model, tiny_vae

if TYPE_CHECKING:
    from serving import Running

pytest.register_assert_rewrite("playground")  # It has fixtures.
torch.set_num_threads(min(2, torch.get_num_threads()))

PARITY = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "parity"


@pytest.fixture
def parity_cases() -> list[Path]:
    """Checkpoints with a reference implementation's outputs; they lie beside the repository, not in it."""
    cases = sorted(path for path in PARITY.glob("*") if (path / "case.json").is_file())
    if not cases:
        pytest.skip("no parity fixtures beside the repository (../shared/fixtures/parity)")
    return cases


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 290)


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> ColaDLM:
    """A small model with a tokenizer."""
    return ColaDLM(
        tiny_vae(3, vocab_size=290), tiny_dit(4), tokenizer, generation={"steps": 2, "guidance": 2.0}
    )


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of conversations that has seen very little."""
    from answers import barely_taught

    return barely_taught(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of preferences."""
    from answers import write_preferences

    return write_preferences(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One that must be unharmed when a module is done with it."""
    from serving import unharmed

    with unharmed() as server:
        yield server


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    """A small model without one."""
    return tiny_model(generation={"steps": 2})
