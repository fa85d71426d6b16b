import random

import pytest

from colada.text.tokenizer import END_OF_TEXT, IM_END, PAD, Tokenizer
from colada.text.transcript import Transcript, sentence_end

TEXTS = [
    "the hen ran to the mill and the hen sat on the hill, then the hen ran home",
    "stop here. STOP there. a stop is not the end",
] * 5
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """ASCII words are merged; everything else costs one token a byte."""
    return Tokenizer.train(TEXTS, 290)


def follow(
    tok: Tokenizer | None,
    blocks: list[list[int]],
    *,
    skip: int = 0,
    limit: int = 1000,
    stop: tuple[str, ...] = (),
    end_ids: tuple[int, ...] | None = None,
    whole_sentences: bool = False,
) -> tuple[Transcript, list[str], list[tuple[int, ...]]]:
    """Feed blocks until the transcript is done; return it, and the chunks of text and tokens."""
    if end_ids is None:
        end_ids = tok.end_ids if tok is not None else ()
    transcript = Transcript(tok, skip, limit, stop, end_ids, (), whole_sentences)
    texts, tokens = [], []
    for block in blocks:
        text, new = transcript.add(block)
        texts.append(text)
        tokens.append(new)
        if transcript.finish_reason is not None:
            break
    return transcript, texts, tokens


def in_blocks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[at : at + size] for at in range(0, len(ids), size)]


# --- stop strings -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("stop", ["mill and", "n ran", " sat on the hill", "t"])
def test_a_stop_string_is_found_however_blocks_cut_it(tok: Tokenizer, size: int, stop: str) -> None:
    text = TEXTS[0]
    transcript, texts, _ = follow(tok, in_blocks(tok.encode(text), size), stop=(stop,))
    assert transcript.text == "".join(texts) == text[: text.index(stop)]
    assert transcript.finish_reason == "stop"


def test_the_earliest_of_several_stops_wins(tok: Tokenizer) -> None:
    for stops in (("hill", "ran", "mill"), ("mill", "hill", "ran"), ("ran to", "ran", "hill")):
        transcript, _, _ = follow(tok, [tok.encode(TEXTS[0])], stop=stops)
        assert transcript.text == "the hen "


def test_the_kept_tokens_spell_nothing_beyond_the_stop(tok: Tokenizer) -> None:
    ids = tok.encode(TEXTS[0])
    for stop in ("en ran", "ran", "mill", "l and", "ome"):
        cut = TEXTS[0].index(stop)
        transcript, _, _ = follow(tok, in_blocks(ids, 3), stop=(stop,))
        kept = transcript.tokens
        assert kept == ids[: len(kept)]
        assert len(tok.decode(kept)) <= cut < len(tok.decode(ids[: len(kept) + 1]))


def test_what_may_become_a_stop_is_held_back_and_released_when_it_does_not(tok: Tokenizer) -> None:
    ids = tok.encode("a stop is here")
    cut = next(n for n in range(len(ids)) if tok.decode(ids[:n]) == "a stop")
    transcript = Transcript(tok, 0, len(ids), ("stop here",), ())
    assert transcript.add(ids[:cut])[0] == "a "
    assert transcript.text == "a stop"
    assert transcript.add(ids[cut:])[0] == "stop is here"
    assert transcript.finish_reason == "length"


def test_held_back_text_is_released_at_the_end(tok: Tokenizer) -> None:
    ids = tok.encode("the hen st")
    for reason, blocks, limit in (
        ("length", [ids], len(ids)),
        ("end", [ids, [tok.eos_id]], 100),
        ("end", [[*ids, tok.eos_id, *tok.encode("op")]], 100),
    ):
        transcript, texts, _ = follow(tok, blocks, stop=("stop",), limit=limit)
        assert "".join(texts) == transcript.text == "the hen st"
        assert transcript.finish_reason == reason


def test_a_stop_within_the_limit_is_a_stop_and_beyond_it_is_not(tok: Tokenizer) -> None:
    ids = tok.encode(TEXTS[0])
    needed = next(n for n in range(len(ids)) if "mill" in tok.decode(ids[:n]))
    assert follow(tok, [ids], stop=("mill",), limit=needed)[0].finish_reason == "stop"
    short = follow(tok, [ids], stop=("mill",), limit=needed - 1)[0]
    assert short.finish_reason == "length"
    assert short.text == tok.decode(ids[: needed - 1])


def test_a_stop_before_an_end_token_wins_over_it(tok: Tokenizer) -> None:
    ids = [*tok.encode("the hen ran"), tok.eos_id, *tok.encode(" home")]
    transcript, _, _ = follow(tok, [ids], stop=("hen",))
    assert (transcript.text, transcript.finish_reason) == ("the ", "stop")
    transcript, _, _ = follow(tok, [ids], stop=("home",))
    assert (transcript.text, transcript.finish_reason) == ("the hen ran", "end")


def test_a_stop_that_begins_before_half_a_character_is_still_held_back(tok: Tokenizer) -> None:
    ids = tok.encode("the é")
    transcript = Transcript(tok, 0, 100, ("e é",), ())
    shown, _ = transcript.add(ids[:-1])
    rest, _ = transcript.add(ids[-1:])
    assert (transcript.text, transcript.finish_reason) == ("th", "stop")
    assert shown + rest == "th"


# --- characters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_character_is_never_shown_half(tok: Tokenizer, size: int) -> None:
    text = "é東🙂 hen 🙂"
    ids = tok.encode(text)
    assert len(ids) > len(text)
    transcript, texts, _ = follow(tok, in_blocks(ids, size))
    assert not any(REPLACEMENT in chunk for chunk in texts)
    assert "".join(texts) == transcript.text == text


def test_bytes_that_never_become_a_character_are_shown_once_that_is_certain(tok: Tokenizer) -> None:
    half = tok.encode("🙂")[:3]
    transcript = Transcript(tok, 0, 100, (), ())
    assert transcript.add(half)[0] == ""
    assert transcript.add(tok.encode(" hen"))[0].endswith(" hen")
    assert transcript.text.startswith(REPLACEMENT)


# --- end tokens, limits, the prompt's tail ------------------------------------------------------


@pytest.mark.parametrize("end", [END_OF_TEXT, IM_END])
def test_an_end_token_ends_the_text_and_is_left_out(tok: Tokenizer, end: str) -> None:
    token = tok.id_of(end)
    assert token is not None
    ids = tok.encode("the hen")
    transcript, texts, tokens = follow(tok, [ids, [token, *tok.encode(" ran")]])
    assert transcript.text == "".join(texts) == "the hen"
    assert transcript.tokens == ids
    assert tokens == [tuple(ids), ()]
    assert transcript.finish_reason == "end"


def test_other_special_tokens_count_but_have_no_text(tok: Tokenizer) -> None:
    ids = [*tok.encode("the"), tok.pad_id, *tok.encode(" hen")]
    transcript, _, _ = follow(tok, [ids], limit=len(ids))
    assert tok.id_of(PAD) == tok.pad_id
    assert transcript.text == "the hen"
    assert transcript.tokens == ids


def test_end_tokens_in_the_skipped_tail_do_not_end_anything(tok: Tokenizer) -> None:
    ids = [tok.eos_id, *tok.encode("the hen")]
    transcript, _, _ = follow(tok, in_blocks(ids, 2), skip=1, limit=len(ids) - 1)
    assert (transcript.text, transcript.finish_reason) == ("the hen", "length")


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("skip", [0, 1, 3, 5])
def test_the_limit_counts_what_follows_the_skipped_tokens(size: int, skip: int) -> None:
    ids = list(range(40))
    for limit in (1, 2, 7, 12):
        transcript, _, tokens = follow(None, in_blocks(ids, size), skip=skip, limit=limit)
        assert transcript.tokens == ids[skip : skip + limit]
        assert [token for chunk in tokens for token in chunk] == transcript.tokens
        assert (transcript.text, transcript.finish_reason) == ("", "length")


# --- guesses ------------------------------------------------------------------------------------


def test_a_guess_reads_as_the_block_would_and_changes_nothing(tok: Tokenizer) -> None:
    ids = tok.encode(TEXTS[0])
    transcript = Transcript(tok, 2, 12, (), tok.end_ids)
    for block in in_blocks(ids, 5)[:2]:
        before = list(transcript.tokens), transcript.text, transcript.finish_reason
        wrong = transcript.guess([tok.pad_id] * 5)
        text, tokens = transcript.guess(block)
        assert (list(transcript.tokens), transcript.text, transcript.finish_reason) == before
        assert wrong[0] == ""
        assert transcript.add(block) == (text, tokens)


def test_a_guess_ends_at_an_end_token_and_at_the_limit(tok: Tokenizer) -> None:
    ids = tok.encode("the hen ran")
    transcript = Transcript(tok, 0, 2, (), tok.end_ids)
    assert transcript.guess(ids)[1] == tuple(ids[:2])
    assert transcript.guess([ids[0], tok.eos_id, ids[1]])[1] == (ids[0],)


# --- whole sentences ----------------------------------------------------------------------------

TALK = 'Mr. Fox ran 2.5 miles. "Stop!" said the hen. The fox sat down... He was tired. "Oh no!" He sl'


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", ""),
        ("The hen ran", ""),
        ("The hen ran. The", "The hen ran."),
        ("The hen ran.", "The hen ran."),
        ('He said "No!" and', ""),
        ('"No!" He said "', '"No!"'),
        ("Dr. Dog ate 3.5 pies", ""),
        ("It is so... He", "It is so..."),
        ("One (and two.) Three", "One (and two.)"),
        ("Why?\n\nBecause", "Why?"),
        ("猫が鳴いた。犬も", "猫が鳴いた。"),
    ],
)
def test_where_a_last_sentence_ends(text: str, end: str) -> None:
    assert text[: sentence_end(text, complete=True)] == end


@pytest.mark.parametrize("size", [1, 3, 8, 200])
def test_a_text_cut_by_its_length_ends_with_its_last_whole_sentence(tok: Tokenizer, size: int) -> None:
    ids = tok.encode(TALK)
    for limit in range(1, len(ids) + 1):
        transcript, texts, _ = follow(tok, in_blocks(ids, size), limit=limit, whole_sentences=True)
        exact = tok.decode(ids[:limit])
        expected = exact[: sentence_end(exact, complete=True)] or exact
        assert transcript.text == "".join(texts) == expected
        assert transcript.finish_reason == "length"
        assert expected.startswith(tok.decode(transcript.tokens))
        assert transcript.tokens == ids[: len(transcript.tokens)]


def test_a_text_that_ends_by_itself_or_at_a_stop_string_is_not_cut(tok: Tokenizer) -> None:
    ids = tok.encode("The hen ran. The fox sat")
    for more, settings in (([tok.eos_id], {}), ([], {"stop": ("sat",)})):
        plain, _, _ = follow(tok, in_blocks([*ids, *more], 4), **settings)  # type: ignore[arg-type]
        whole, texts, _ = follow(tok, in_blocks([*ids, *more], 4), whole_sentences=True, **settings)  # type: ignore[arg-type]
        assert whole.text == plain.text == "".join(texts)
        assert whole.finish_reason == plain.finish_reason


# --- all of it, at random -----------------------------------------------------------------------

PIECES = [
    "the",
    " hen",
    " ran",
    "é",
    "東京",
    "🙂",
    " ",
    ".",
    "st",
    "op",
    "stop",
    "\n",
    "naïve",
    ". He",
    '!" ',
]
STOPS = ["stop", "hen r", "é", "e 🙂", "東", " .", "\n\n", "op st", "🙂🙂"]


def random_ids(rng: random.Random, tok: Tokenizer) -> list[int]:
    """Words, single bytes of characters, special tokens, and any id at all."""
    ids: list[int] = []
    for _ in range(rng.randrange(1, 25)):
        draw = rng.random()
        if draw < 0.75:
            ids += tok.encode(rng.choice(PIECES))
        elif draw < 0.9:
            ids += tok.encode(rng.choice("é東🙂"))[: rng.randrange(1, 4)]
        elif draw < 0.97:
            ids.append(rng.randrange(tok.vocab_size - 4))
        else:
            ids.append(rng.choice([tok.pad_id, tok.eos_id]))
    return ids


def random_blocks(rng: random.Random, ids: list[int]) -> list[list[int]]:
    blocks = []
    while ids:
        size = rng.randrange(1, 7)
        blocks.append(ids[:size])
        ids = ids[size:]
    return blocks


def expected_text(
    tok: Tokenizer, ids: list[int], limit: int, stop: tuple[str, ...], whole_sentences: bool
) -> tuple[str, str | None]:
    """The text and finish reason of all ids seen at once."""
    end = next((n for n, token in enumerate(ids) if token in tok.end_ids), len(ids))
    reason = "length" if end >= limit else "end" if end < len(ids) else None
    text = tok.decode(ids[: min(end, limit)])
    found = [text.index(s) for s in stop if s in text]
    if found:
        return text[: min(found)], "stop"
    if whole_sentences and reason == "length":
        text = text[: sentence_end(text, complete=True) or len(text)]
    return text, reason


@pytest.mark.parametrize("seed", range(6))
def test_random_text_in_random_blocks_reads_as_it_does_at_once(tok: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    reasons = set()
    for _ in range(150):
        ids = random_ids(rng, tok)
        skip = rng.choice([0, 0, 2])
        limit = rng.choice([5, 20, 1000])
        stop = (rng.choice(STOPS),) if rng.random() < 0.7 else ()
        blocks, whole = random_blocks(rng, ids), rng.random() < 0.3
        transcript, texts, tokens = follow(
            tok, blocks, skip=skip, limit=limit, stop=stop, whole_sentences=whole
        )
        text, reason = expected_text(tok, ids[skip:], limit, stop, whole)
        reasons.add(reason)
        case = (ids, blocks, skip, limit, stop, whole)
        assert transcript.finish_reason == reason, case
        assert transcript.text == text, case
        if reason is not None:
            assert "".join(texts) == text, case
        else:
            # Not finished: what is shown is settled, and what is held may still become something else.
            assert text.startswith("".join(texts)), case
        if reason != "stop" and not whole:
            assert [token for chunk in tokens for token in chunk] == transcript.tokens, case
        assert ids[skip : skip + len(transcript.tokens)] == transcript.tokens, case
    assert reasons == {None, "end", "length", "stop"}


@pytest.mark.parametrize("seed", range(3))
def test_with_several_stops_none_is_ever_shown(tok: Tokenizer, seed: int) -> None:
    rng = random.Random(100 + seed)
    for _ in range(150):
        ids = random_ids(rng, tok)
        stop = tuple(rng.sample(STOPS, 3))
        blocks = random_blocks(rng, ids)
        transcript, texts, _ = follow(tok, blocks, stop=stop)
        shown = "".join(texts)
        assert transcript.text.startswith(shown), (blocks, stop)
        assert not any(s in shown for s in stop), (blocks, stop)
        if transcript.finish_reason is not None:
            assert shown == transcript.text, (blocks, stop)
