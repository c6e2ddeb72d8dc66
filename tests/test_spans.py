"""Text of tokens and regex spans, on tiny tokenizers of each kind, built here."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from xtf_plugin.errors import XTFUserError
from xtf_plugin.data.token_text import byte_alphabet, characters, is_text, match_spans, token_bytes

CORPUS = ["The answer is 42 .", "Let us think step by step; the answer is near.", "naïve café 漢字 🙂 test test"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<é>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece():
    """Pieces as in Llama 2 and Gemma: U+2581 for a space, <0xAB> for bytes outside the vocabulary."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁the", "▁answer", "▁is", "an", "s", "w", "e", "r", "t", "h", "n", "4", "2", "▁42"]
    vocab = {piece: index for index, piece in enumerate(["<unk>", "</s>", *bytes_, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<s>"], unk_token="<s>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def wordpiece():
    words = ["[UNK]", "answer", "the", "##ing", "sing", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def marked(tokenizer, text, *patterns):
    """The concatenated bytes of the marked tokens."""
    ids = encode(tokenizer, text)
    mask = match_spans(tokenizer, ids, [0, len(ids)], patterns)
    return b"".join(p for p, m in zip(token_bytes(tokenizer, ids), mask, strict=True) if m)


def test_byte_alphabet_is_the_librarys():
    assert len(set(byte_alphabet().values())) == 256
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()["Ġ"] == 0x20 and byte_alphabet()["Ċ"] == 0x0A and byte_alphabet()["A"] == 0x41


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_byte_level_tokens_concatenate_to_the_text(text):
    tokenizer = SHARED["byte_level"]
    assert b"".join(token_bytes(tokenizer, encode(tokenizer, text))) == text.encode()


SHARED = {"byte_level": byte_level()}


@pytest.mark.parametrize("text", [" the answer is 42", " the naïve 漢🙂", "answer"])
def test_sentencepiece_tokens_concatenate_to_the_text(text):
    tokenizer = sentencepiece()
    assert b"".join(token_bytes(tokenizer, encode(tokenizer, text))) == text.encode()


def test_unigram_pieces_keep_their_spaces():
    tokenizer = unigram()
    ids = encode(tokenizer, "the answer is near")
    assert b"".join(token_bytes(tokenizer, ids)) == b" the answer is near"
    assert tokenizer.decode(ids) == "the answer is near"
    tokenizer.add_tokens(["<0x41>"])
    assert token_bytes(tokenizer, encode(tokenizer, "<0x41>"))[-1] == b"<0x41>", "no byte fallback, no byte pieces"


def test_special_and_added_tokens_are_their_literal_content():
    tokenizer = byte_level()
    ids = encode(tokenizer, "<|end|><é>")
    assert token_bytes(tokenizer, ids) == [b"<|end|>", "<é>".encode()], "é alone would be spelt byte 0xE9"
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["</s>", "▁▁▁", "<0x0A>"])
    assert token_bytes(tokenizer, ids) == [b"</s>", b"   ", b"\n"]
    assert token_bytes(tokenizer, [10**6]) == [b""]


def test_other_decoders_are_asked_token_by_token():
    tokenizer = wordpiece()
    assert token_bytes(tokenizer, [1, 2, 5]) == [b"answer", b"the", b"[SEP]"]


@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_a_character_over_several_tokens_is_marked_whole(build):
    tokenizer = build()
    text = " 漢éx🙂"
    ids = encode(tokenizer, text)
    pieces = token_bytes(tokenizer, ids)
    assert len(ids) > len(text), "characters are split over byte tokens"
    mask = match_spans(tokenizer, ids, [0, len(ids)], ["🙂"])
    assert b"".join(p for p, m in zip(pieces, mask, strict=True) if m) == "🙂".encode()
    cut = next(i for i, piece in enumerate(pieces) if piece[:1] > b"\x7f") + 1
    broken = ids[cut:-1]  # begins and ends within a character
    mask = match_spans(tokenizer, broken, [0, len(broken)], ["x"])
    assert [p for p, m in zip(pieces[cut:-1], mask, strict=True) if m] == [b"x"]
    assert not all(map(is_text, pieces))
    assert b"".join(whole for *_, whole in characters(pieces)) == text.encode()
    assert all(is_text(whole) for *_, whole in characters(pieces))


def test_every_token_that_overlaps_a_match_is_marked_and_no_other():
    tokenizer = byte_level()
    for text in (" The answer is 42. ", "naïve café; the answer is near: 🙂 test"):
        ids = encode(tokenizer, text)
        ends = np.cumsum([len(p) for p in token_bytes(tokenizer, ids)])
        starts = np.concatenate([[0], ends[:-1]])
        for pattern in (r"answ", r"\d+", r"e", r"é.*s", r"[^ ]+$", r"(?=x)|q*"):
            expected = np.zeros(len(ids), dtype=bool)
            for match in re.finditer(pattern, text):
                low, high = (len(text[:at].encode()) for at in match.span())
                expected |= (starts < high) & (ends > low) & (high > low)
            found = match_spans(tokenizer, ids, [0, len(ids)], [pattern])
            np.testing.assert_array_equal(found, expected, err_msg=pattern)


def test_several_patterns_are_united():
    assert marked(byte_level(), "a1b2", "a", "2") == b"a2"
    assert marked(byte_level(), "a1b2") == b""


def test_an_empty_match_marks_nothing():
    assert marked(byte_level(), "the answer", r"x*", r"$", r"\b") == b""


def test_runs_are_searched_by_themselves():
    tokenizer = byte_level()
    ids = encode(tokenizer, "ab") + encode(tokenizer, "cd")
    half = len(encode(tokenizer, "ab"))
    assert not match_spans(tokenizer, ids, [0, half, half, len(ids)], ["bc"]).any()
    assert match_spans(tokenizer, ids, [0, len(ids)], ["bc"]).any()
    anchored = match_spans(tokenizer, ids, [0, half, half, len(ids)], ["^."])
    assert np.flatnonzero(anchored).tolist() == [0, half]
    assert match_spans(tokenizer, [], [0], ["x"]).shape == (0,)


def test_tokens_of_no_bytes_are_never_marked():
    tokenizer = byte_level()
    ids = [*encode(tokenizer, "a"), 10**6, *encode(tokenizer, "b")]
    assert match_spans(tokenizer, ids, [0, 3], ["ab"]).tolist() == [True, False, True]


def test_a_broken_pattern_is_named():
    with pytest.raises(XTFUserError, match=r"'\(a' .*regular expression"):
        match_spans(byte_level(), [1], [0, 1], ["(a"])
