"""Text in pieces: put together they are the text, and no piece is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dmax.outputs import before_stop
from dmax.serve.deltas import Deltas, certain
from dmax.tiny.tokenizer import build_tokenizer

LETTERS = "ab"  # few, so that stop texts are found, and begin without ending
WORDS = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 60), max_size=6)


def decode_bytes(token_ids: Sequence[int]) -> str:
    """The text of tokens that are single bytes, as a byte-level tokenizer decodes them."""
    return bytes(token_ids).decode(errors="replace")


def pieces_of(text: bytes, cuts: Sequence[int], stops: Sequence[str]) -> Deltas:
    """Deltas of a text that came in blocks, up to the one that has a stop text."""
    deltas = Deltas(decode_bytes, stops)
    pieces = []
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        pieces.append(deltas.add(text[start:end]))
        if deltas.is_over:
            break
    whole = before_stop(decode_bytes(text), stops)
    assert whole.startswith("".join(pieces))
    pieces.append(deltas.end(whole))
    assert "".join(pieces) == deltas.text == whole
    return deltas


@given(WORDS, STOPS, CUTS)
def test_pieces_are_the_text_before_the_first_stop_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    deltas = pieces_of(text.encode(), cuts, stops)
    assert deltas.is_over == any(stop in text for stop in stops)


@given(st.text("aé€😀", max_size=12), CUTS)
def test_characters_that_are_split_over_blocks_come_whole(text: str, cuts: list[int]) -> None:
    pieces_of(text.encode(), cuts, ())


@given(st.binary(max_size=24), CUTS, st.lists(st.sampled_from("\ufffdA"), max_size=1))
def test_bytes_that_are_no_text_are_written_as_they_are_decoded_whole(
    text: bytes, cuts: list[int], stops: list[str]
) -> None:
    pieces_of(text, cuts, stops)


@given(st.lists(st.integers(0, 959), max_size=40), CUTS)
def test_tokens_of_the_bundled_models_add_up_to_their_text(ids: list[int], cuts: list[int]) -> None:
    deltas = Deltas(DECODE)
    pieces = [deltas.add(ids[start:end]) for start, end in pairwise([0, *sorted(cuts), len(ids)])]
    whole = DECODE(ids)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + deltas.end(whole) == whole


DECODE = partial(build_tokenizer().decode, skip_special_tokens=True)


def falling_back() -> Tokenizer:
    """A tokenizer as Llama 2, Mistral and Gemma have it: what it has no token for is bytes."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "\u2581a", "b"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return tokenizer


DECODE_FALLING_BACK = falling_back().decode
WORD = 257  # " a"
TEXTS = st.lists(  # of ordinary tokens and of characters in bytes
    st.one_of(
        st.sampled_from([[WORD], [WORD + 1]]),
        st.sampled_from("é€😀鰯\n\ufffd").map(lambda mark: list(mark.encode())),
    ),
    max_size=16,
)


def given_in(ids: Sequence[int], cuts: Sequence[int]) -> str:
    """What comes of tokens in blocks, with the rest at the end."""
    deltas = Deltas(DECODE_FALLING_BACK)
    pieces = [deltas.add(ids[start:end]) for start, end in pairwise([0, *sorted(cuts), len(ids)])]
    return "".join(pieces) + deltas.end(DECODE_FALLING_BACK(ids))


@given(TEXTS, CUTS)
def test_characters_of_single_bytes_come_whole(parts: list[list[int]], cuts: list[int]) -> None:
    ids = sum(parts, [])
    whole = DECODE_FALLING_BACK(ids)
    assert given_in(ids, cuts) == whole
    assert given_in(ids, range(len(ids))) == whole


@given(st.lists(st.integers(0, WORD + 1), max_size=24), CUTS)
def test_bytes_that_are_no_text_add_nothing_and_take_nothing(
    ids: list[int], cuts: list[int]
) -> None:
    assert len(given_in(ids, cuts)) == len(DECODE_FALLING_BACK(ids))


@pytest.mark.parametrize("text", ["鰯鱈鮪鯛鰻", "😀" * 9])
def test_a_run_of_bytes_comes_as_its_characters_are_whole(text: str) -> None:
    deltas = Deltas(DECODE_FALLING_BACK)
    ids = [WORD, *text.encode()]
    pieces = [deltas.add([token]) for token in ids]
    assert "".join(pieces) == "a" + text
    assert [piece for piece in pieces if piece] == ["a", *text]


def test_old_tokens_are_not_decoded_again() -> None:
    num_decoded = []

    def decode(ids: Sequence[int]) -> str:
        num_decoded.append(len(ids))
        return str(DECODE_FALLING_BACK(ids))

    deltas = Deltas(decode)
    for token in [WORD, *"鰯".encode()] * 50:
        deltas.add([token])
    assert max(num_decoded) <= 12


@given(WORDS, STOPS, WORDS)
def test_what_is_certain_stays_whatever_follows(text: str, stops: list[str], more: str) -> None:
    sure = text[: certain(text, stops)]
    assert before_stop(text + more, stops).startswith(sure)


@given(WORDS, STOPS.filter(len))
def test_no_more_is_held_back_than_could_begin_a_stop_text(text: str, stops: list[str]) -> None:
    end = certain(text, stops)
    if end < len(text):
        assert any(stop.startswith(text[end:]) or text[end:].startswith(stop) for stop in stops)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    deltas = Deltas(decode_bytes, ["###"])
    parts = ("one #", "two ##", " three ", "##", "# four")
    pieces = [deltas.add(part.encode()) for part in parts]
    assert pieces == ["one ", "#two ", "## three ", "", ""]
    assert deltas.is_over
    assert deltas.end("one #two ## three ") == ""
