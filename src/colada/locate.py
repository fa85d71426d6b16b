"""Where a model is: a directory, or a hub repository's local copy. Nothing here waits for torch."""

from __future__ import annotations

import difflib
import errno
import os
import re
from pathlib import Path

from colada.errors import ColadaError, shown
from colada.files import read_json_object

DIT_DIR, VAE_DIR, DECODER_DIR, IMAGE_DIR = "cola_dit", "cola_vae", "decoder", "cola_image"
TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE, CHAT_TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"

DIFFERENCE_FILE, DIFFERENCE_WEIGHTS = "difference.json", "difference.safetensors"
"""Of a directory that holds what a model differs by from another: see :mod:`colada.models.difference`."""

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_FEW = BUNDLED / "few"
"""What a student of few evaluations a block differs by from the bundled model."""
BUNDLED_CHAT = BUNDLED / "chat"
"""What answers differ by from the bundled model, where this installation has it."""
NAMED = {"bundled": BUNDLED, "bundled-few": BUNDLED_FEW, "bundled-chat": BUNDLED_CHAT}
"""Models that come with the package, by name."""

_PARTS = (DIT_DIR, VAE_DIR, DECODER_DIR)
_RELEASED = "cola_dlm"  # The released hub repository has its networks in here, and the tokenizer beside it.


def locate(where: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a model: itself, or the local copy of a hub repository, downloaded if need be.

    Raises:
        ColadaError: if there is no such directory, repository or revision, or the hub cannot be reached.
    """
    path = local(where, revision)
    return _download(str(where), revision) if path is None else path


def local(where: str | Path, revision: str | None = None) -> Path | None:
    """Return the directory of a model that is on this machine, or None for a hub repository's id.

    Raises:
        ColadaError: for anything else, with the nearest thing that is a model.
    """
    if not isinstance(where, str | Path):
        raise ColadaError(f"model {shown(where)}, expected a directory or a hub id of the form owner/name")
    if revision is not None and not isinstance(revision, str):
        raise ColadaError(f"revision={shown(revision)}, expected the name of a branch, tag or commit")
    name = str(where)
    path = Path(os.path.expanduser(name))
    if name in NAMED and not os.path.exists(path) and NAMED[name].is_dir():
        return NAMED[name]
    if name and os.path.isdir(path):
        if revision is not None:
            raise ColadaError(
                f"{path}: revision={revision!r} was given, but this is a directory, not a hub id"
            )
        if not _is_model(path) and _is_model(path / _RELEASED):
            return path / _RELEASED
        if not _is_model(path):
            raise ColadaError(
                f"{path} is no model directory: {DIT_DIR}/ and {VAE_DIR}/ are missing{_hint(path)}"
            )
        return path
    if name and os.path.exists(path):
        raise ColadaError(
            f"{path} is a file, expected a model directory with {DIT_DIR}/ and {VAE_DIR}/{_hint(path)}"
        )
    if not is_hub_id(name):
        reason = "not a directory, and not a hub id of the form owner/name"
        raise ColadaError(f"no model at {name!r}: {reason}{_hint(path)}")
    return None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub repository's id, owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def find_tokenizer(directory: Path) -> Path | None:
    """Return the tokenizer file beside the two networks or one level up, or None."""
    base = base_of(directory)
    if base is not None:
        return find_tokenizer(base)
    for candidate in (directory / TOKENIZER_FILE, directory.parent / TOKENIZER_FILE):
        if os.path.lexists(candidate):
            return candidate
    return None


def base_of(directory: Path) -> Path | None:
    """Return where the model is that a directory holds a difference to; None if it holds a model itself.

    Raises:
        ColadaError: if that is not said, or there is no such model.
    """
    file = directory / DIFFERENCE_FILE
    if not os.path.lexists(file):
        return None
    base = read_json_object(file).get("base")
    if not isinstance(base, str):
        raise ColadaError(f"{file}: base={shown(base)}, expected the name or directory of a model")
    where = locate(base)
    if os.path.lexists(where / DIFFERENCE_FILE):
        raise ColadaError(f"{file}: base={base!r} is a difference itself, expected a whole model")
    return where


def _is_model(path: Path) -> bool:
    return any(os.path.isdir(path / part) for part in _PARTS) or os.path.isfile(path / DIFFERENCE_FILE)


def _hint(path: Path) -> str:
    """Return which model, or command, a path that is none may have meant, in brackets; or nothing."""
    if _is_model(path / "model"):
        return f" (did you mean {path / 'model'}?)"
    for parent in list(path.parents)[:2]:  # of a part, or of a file in one
        if path.name and _is_model(parent):
            return f" (did you mean {parent}?)"
    if os.path.isfile(path / "state.json"):
        return f" (a checkpoint: colada export {path} MODEL makes it a model)"
    if os.path.isdir(path / "checkpoints"):
        return f" (a run that has no model yet: colada export {path / 'checkpoints'}/... MODEL makes one)"
    if not os.path.exists(path):
        checkpoints = path.parent / "checkpoints"
        if path.name == "model" and os.path.isdir(checkpoints):
            return f" (a run that has no model yet: colada export {checkpoints}/... {path} makes one)"
        return _nearest_sibling(path)
    return ""


def _nearest_sibling(path: Path) -> str:
    """Return the directory whose name is nearest to the first part of a path that is not there."""
    missing = path
    while missing != missing.parent and not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        names = [entry.name for entry in os.scandir(missing.parent) if entry.is_dir()]
    except OSError:
        return ""  # Only the hint is lost: what is wrong has been said.
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f" (did you mean {missing.parent / close[0]}?)" if close else ""


def _download(name: str, revision: str | None) -> Path:
    # 0.4 s that only a hub id should cost.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folders = [
        f"{part}/*" for part in (*_PARTS, IMAGE_DIR, f"{_RELEASED}/{DIT_DIR}", f"{_RELEASED}/{VAE_DIR}")
    ]
    patterns = [*folders, TOKENIZER_FILE, GENERATION_FILE, CHAT_TEMPLATE_FILE]
    patterns += [DIFFERENCE_FILE, DIFFERENCE_WEIGHTS]
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise ColadaError(f"hub repository {name!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ColadaError(
            f"no directory and no hub repository called {name!r} (or it is private){_hint(Path(name))}"
        ) from None
    except HFValidationError as error:
        raise ColadaError(f"{name!r} is not a hub id: {error}") from None
    except OSError as error:
        if not isinstance(error, LocalEntryNotFoundError) and error.errno in (errno.ENOSPC, errno.EACCES):
            raise ColadaError(f"cannot store {name!r} in the hub's local cache: {error}") from None
        raise _unreachable(name) from None
    except Exception as error:
        # The hub's HTTP library has errors of its own, which differ between versions.
        raise _unreachable(name, f": {type(error).__name__}") from error
    for path in (snapshot, snapshot / _RELEASED):
        if _is_model(path):
            return path
    raise ColadaError(f"hub repository {name!r} holds no model: {DIT_DIR}/ and {VAE_DIR}/ are missing")


def _unreachable(name: str, why: str = "") -> ColadaError:
    return ColadaError(
        f"{name!r} is neither a local directory nor in the hub's local cache, and the hub cannot be "
        f"reached (offline?{why}); download it where there is a network, or give a directory"
        f"{_hint(Path(name))}"
    )
