import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from colada.errors import ColadaError
from colada.text.tokenizer import END_OF_TEXT, IM_END, IM_START, PAD, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.\n",
    "def add(a, b):\n    return a + b  # 12345 67\r\n",
    "Größe, naïveté, 東京は晴れ, Привет мир, 🙂🙃\n\n",
] * 20


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


def random_text(rng: random.Random) -> str:
    """Characters of every UTF-8 length, with white space and ASCII over-represented; no surrogates."""
    ranges = [(0x20, 0x7E), (0, 0x1F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    picks = rng.choices(ranges, weights=[6, 3, 1, 1, 1, 1], k=rng.randrange(60))
    return "".join(chr(rng.randint(low, high)) for low, high in picks)


def test_any_text_round_trips(tok: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "  a  ",
        "\r\n\n\t",
        "\x00",
        "\ufeffx",
        "é",
        "e\u0301",
        *(random_text(rng) for _ in range(300)),
    ]
    for text in texts:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert len(ids) <= len(text.encode())
        assert all(0 <= i < tok.vocab_size for i in ids)


def test_an_untrained_script_costs_its_bytes() -> None:
    bare = Tokenizer.train([], 260)
    assert len(bare.encode("ab ಕ🙂")) == len("ab ಕ🙂".encode())


def test_merges_were_learned(tok: Tokenizer) -> None:
    assert len(tok.encode(TEXTS[0])) < 0.7 * len(TEXTS[0].encode())


def test_split_keeps_digit_runs_at_three_and_words_apart() -> None:
    tok = Tokenizer.train(["123456789 ab ab's"] * 50, 269)
    pieces = [tok.decode([i]) for i in tok.encode("123456789 ab ab's")]
    assert pieces == ["123", "456", "789", " ab", " ab", "'s"]


def test_encode_batch_equals_encode(tok: Tokenizer) -> None:
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(50)]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    assert tok.encode_batch([]) == []


def test_specials_take_the_last_four_ids(tok: Tokenizer) -> None:
    assert tok.vocab_size == 320
    assert {tok.id_of(t) for t in (END_OF_TEXT, PAD, IM_START, IM_END)} == {316, 317, 318, 319}
    assert tok.eos_id == tok.id_of(END_OF_TEXT)
    assert tok.pad_id == tok.id_of(PAD)
    assert tok.end_ids == (tok.eos_id, tok.id_of(IM_END))
    assert tok.id_of("<|nothing|>") is None


def test_specials_are_recognised_in_text_but_never_added(tok: Tokenizer) -> None:
    assert tok.eos_id not in tok.encode("plain")
    ids = tok.encode(f"a{END_OF_TEXT}b")
    assert ids == [*tok.encode("a"), tok.eos_id, *tok.encode("b")]
    assert tok.decode(ids) == "ab"
    assert tok.decode(ids, skip_special=False) == f"a{END_OF_TEXT}b"


def test_end_tokens_that_a_file_does_not_mark_are_special_all_the_same(
    tok: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads(tok.to_json())
    for token in content["added_tokens"]:
        token["special"] = token["content"] == PAD
    extra = {**content["added_tokens"][0], "id": 320, "special": False, "content": "|||PHONE|||"}
    content["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert set(tok.specials) == {END_OF_TEXT, PAD, IM_START, IM_END}
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").specials == tok.specials


def test_special_names_in_training_text_do_not_disturb_them() -> None:
    tok = Tokenizer.train([f"a {END_OF_TEXT} {PAD} b"] * 50, 270)
    assert tok.eos_id >= 266
    assert tok.encode(END_OF_TEXT) == [tok.eos_id]


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    bare = Tokenizer.train([], 260)
    ids = bare.encode("x🙂")
    assert len(ids) == 5
    assert bare.decode(ids[:3]).startswith("x\ufffd")


def test_training_is_deterministic_whatever_the_threads(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "here.json")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_tokenizer import TEXTS, Tokenizer\n"
        "Tokenizer.train(iter(TEXTS), 320).save(sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "there.json")],
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
    )
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_save_and_load(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "t.json")
    again = Tokenizer.from_file(tmp_path / "t.json")
    assert again.end_ids == tok.end_ids
    assert again.vocab_size == tok.vocab_size
    for text in TEXTS[:3]:
        assert again.encode(text) == tok.encode(text)
        assert again.decode(tok.encode(text)) == text


def test_truncation_and_padding_in_a_file_are_ignored(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "t.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "t.json"))
    assert Tokenizer.from_file(tmp_path / "t.json").encode_batch(TEXTS[:2]) == tok.encode_batch(TEXTS[:2])


def test_a_file_without_im_end_ends_at_end_of_text_only(tmp_path: Path) -> None:
    words = {"a": 0, END_OF_TEXT: 1, PAD: 7}  # with a gap: the size is that of an embedding table
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(tmp_path / "t.json"))
    tok = Tokenizer.from_file(tmp_path / "t.json")
    assert tok.end_ids == (1,)
    assert tok.vocab_size == 8


@pytest.mark.parametrize(("kept", "missing"), [(PAD, END_OF_TEXT), (END_OF_TEXT, PAD)])
def test_a_file_lacking_a_required_token_is_refused(tmp_path: Path, kept: str, missing: str) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, kept: 1}, unk_token="a"))
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(ColadaError) as caught:
        Tokenizer.from_file(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in str(caught.value)
    assert f"no {missing}" in str(caught.value)
    assert f"no {kept}" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "X"}}']
)
def test_a_missing_or_corrupt_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ColadaError) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_and_a_folder_are_refused(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    assert json.loads(text)["version"]
    (tmp_path / "t.json").write_text(text[: len(text) // 2], encoding="utf-8")
    for path in (tmp_path / "t.json", tmp_path):
        with pytest.raises(ColadaError, match=str(path)):
            Tokenizer.from_file(path)
    with pytest.raises(ColadaError, match="cannot be written"):
        tok.save(tmp_path / "none" / "t.json")


def test_vocab_size_below_the_bytes_is_refused() -> None:
    with pytest.raises(ColadaError, match=r"vocab_size is 259, expected at least 260"):
        Tokenizer.train(TEXTS, 259)


def test_too_little_text_says_how_far_it_reaches() -> None:
    # One word of three letters allows two merges: 256 + 2 + 4.
    with pytest.raises(ColadaError, match=r"is 300, but .* only 262 entries; .*vocab_size <= 262$"):
        Tokenizer.train(["abc"] * 9, 300)
    assert Tokenizer.train(["abc"] * 9, 300, fewer=True).vocab_size == 262
    assert Tokenizer.train(["abc"] * 9, 262).vocab_size == 262


def test_a_lone_surrogate_is_refused(tok: Tokenizer) -> None:
    with pytest.raises(ColadaError, match=r"surrogate .* at character 2"):
        tok.encode("ab\ud800")
    with pytest.raises(ColadaError, match="surrogate"):
        tok.encode_batch(["fine", "\udfff"])
