"""Byte-level BPE tokenizer: text to ids and back, a thin layer over ``tokenizers``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from colada.checks import check_ids, is_whole, require_flag
from colada.errors import ColadaError, shown
from colada.files import MOST_JSON, as_path, read_text, write_text

# The names OLMo 2 (dolma2) uses, so that released checkpoints and new ones share code.
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

_SPECIALS = (END_OF_TEXT, PAD, IM_START, IM_END)
_SMALLEST_VOCAB = 256 + len(_SPECIALS)
MOST_VOCAB = 2**24
"""Entries of a vocabulary that is learnt, as in configurations; the largest known have a hundredth of it."""

# GPT-4's split: contractions, words, numbers of at most three digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back.

    Made by :meth:`from_file` or :meth:`train`. Both end-of-text and padding
    must be in the vocabulary; ``<|im_end|>`` may be.
    """

    def __init__(self, inner: tokenizers.Tokenizer, origin: str = "tokenizer") -> None:
        """Wrap ``inner``; ``origin`` names it in errors.

        Raises ColadaError when it is none, or lacks ``<|endoftext|>`` or ``<|pad|>``.
        """
        if not isinstance(inner, tokenizers.Tokenizer):
            raise ColadaError(f"inner={shown(inner)}, expected a tokenizers.Tokenizer")
        # A file may carry truncation or padding, either of which would silently change documents.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        vocab: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        for token in (END_OF_TEXT, PAD):
            if token not in vocab:
                raise ColadaError(f"{origin}: no {token} in the vocabulary, expected {END_OF_TEXT} and {PAD}")
        self.eos_id: int = vocab[END_OF_TEXT]
        self.pad_id: int = vocab[PAD]
        self.end_ids: tuple[int, ...] = tuple(
            vocab[token] for token in (END_OF_TEXT, IM_END) if token in vocab
        )
        """Ids that end a generation: end-of-text and, where present, ``<|im_end|>``."""
        self.vocab_size: int = max(vocab.values()) + 1
        """Highest id plus one, the rows of an embedding table: not the entries, as there may be gaps."""
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self._bytes = frozenset(vocab[name] for name in names if name in vocab)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises ColadaError, naming the file, when it is missing, is not a
        tokenizer, or lacks ``<|endoftext|>`` or ``<|pad|>``.
        """
        text = read_text(as_path(path), "a tokenizer.json", MOST_JSON)
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ColadaError(f"{path}: not a tokenizer.json ({error})") from error
        return cls(inner, origin=str(path))

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, progress: bool = False, fewer: bool = False
    ) -> Tokenizer:
        """Learn a byte-level BPE from ``texts``; the same texts give the same tokenizer.

        Args:
            texts: all 256 bytes are entries, so any other text survives encoding and decoding too.
            vocab_size: in all: 256 bytes, merges, and the four special tokens, which have the last ids.
            progress: show the library's bars.
            fewer: where the texts are too few to fill it, take as many entries as they yield.

        Raises:
            ColadaError: when ``vocab_size`` is below 260 or beyond :data:`MOST_VOCAB`, a text is none, or,
                without ``fewer``, the texts are too few to fill it.
        """
        if not is_whole(vocab_size) or not _SMALLEST_VOCAB <= vocab_size <= MOST_VOCAB:
            raise ColadaError(
                f"vocab_size is {shown(vocab_size)}, expected at least {_SMALLEST_VOCAB}"
                f" (256 bytes and {len(_SPECIALS)} special tokens) and at most {MOST_VOCAB}"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(_SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=progress,
        )
        inner.train_from_iterator(_texts(texts), trainer)
        # Added after training: the trainer would give special tokens the first ids.
        inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
        reached = inner.get_vocab_size(with_added_tokens=True)
        if reached != vocab_size and not fewer:
            raise ColadaError(
                f"vocab_size is {vocab_size}, but the training text yields only {reached} entries;"
                f" expected more text or vocab_size <= {reached}"
            )
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no special tokens are added.

        A special token spelled out in ``text``, such as ``<|endoftext|>``, is
        recognised and becomes its one id: strip it beforehand where the text is
        not trusted. Raises ColadaError when ``text`` holds a lone surrogate,
        which no UTF-8 text can.
        """
        _check_encodable(text)
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode` of each text, computed in parallel."""
        checked = list(_texts(texts))
        encodings = self._inner.encode_batch_fast(checked, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ``ids``, without the special tokens unless ``skip_special`` is false.

        Bytes that are not UTF-8, such as half a character, become U+FFFD. Ids
        outside the vocabulary have no text and add none.
        """
        require_flag("skip_special", skip_special)
        try:
            text: str = self._inner.decode(list(ids), skip_special_tokens=bool(skip_special))
        except (TypeError, OverflowError, RuntimeError):
            # Looked at only now: this is called for every block.
            text = self._inner.decode(check_ids(ids, 2**32, "token"), skip_special_tokens=bool(skip_special))
        return text

    def bytes_at_end(self, ids: Sequence[int]) -> int:
        """Return how many of the last ids are single bytes that a decoder of characters falls back to.

        Such a run is decoded as one: how its first bytes read depends on its last.
        """
        count = 0
        while self._bytes and count < len(ids) and ids[-1 - count] in self._bytes:
            count += 1
        return count

    def id_of(self, token: str) -> int | None:
        """Return the id of one vocabulary entry, or None when there is no such entry."""
        _check_encodable(token)
        number: int | None = self._inner.token_to_id(token)
        return number

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json``."""
        text: str = self._inner.to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json``, at once. Raises ColadaError when ``path`` cannot be written."""
        write_text(as_path(path), self.to_json())

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens, as they are spelled; the four known by name even if the file marks none."""
        added = self._inner.get_added_tokens_decoder()
        tokens = [token for _, token in sorted(added.items())]
        return tuple(token.content for token in tokens if token.special or token.content in _SPECIALS)


def _texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts once checked. Raises ColadaError for what is none, such as a single one."""
    try:
        several = iter(texts)
    except TypeError:
        several = None
    if several is None or isinstance(texts, str):
        raise ColadaError(f"texts={shown(texts)}, expected several texts")
    for text in several:
        _check_encodable(text)
        yield text


def _check_encodable(text: str) -> None:
    if not isinstance(text, str):
        raise ColadaError(f"text is {shown(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ColadaError(
            f"text holds a lone surrogate {text[error.start]!r} at character {error.start},"
            " expected Unicode text"
        ) from None
