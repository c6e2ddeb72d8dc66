"""Text becomes token rows, and every completion token gets a kind: what drops and losses are counted by.

The tokenizer is byte-level BPE trained on the base model's own text, with single digits, as most current models have
them: a number is then several tokens, and what happens to numbers can be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.proof.data import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, Row

from .records import Record

ANSWER = "answer"
KINDS = (
    "word",
    "number",
    "punctuation",
    "line break",
    "other space",
    "calculator",
    "answer mark",
    ANSWER,
    "end of text",
)


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=context,
    )


def kind(record: Record, begin: int, end: int) -> str:
    """What the completion's text between two places is for.

    The final answer comes first, then annotations; the rest goes by its characters. A token that holds the space
    before an answer and the answer belongs to the answer; the space alone does not.
    """
    text = record.completion[begin:end]
    if end > record.answer:
        return ANSWER
    if end > record.line:
        return "answer mark"
    if any(begin < high and end > low for low, high in record.calculator):
        return "calculator"
    if not text.strip():
        return "line break" if "\n" in text else "other space"
    if any(letter.isdigit() for letter in text):
        return "number"
    return "word" if any(letter.isalpha() for letter in text) else "punctuation"


def encode(record: Record, tokenizer: Any, context: int, prompt: int | None = None) -> Row:
    """A row that fits the context: the end of the prompt's head gives way first, then the completion's.

    Args:
        prompt: at most so many tokens of prompt, however much room there is.
    """
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (record.head, record.tail))
    found = tokenizer(record.completion, add_special_tokens=False, return_offsets_mapping=True)
    room = context - len(tail) - 2  # BOS and EOS
    ids = found["input_ids"][:room]
    kinds = [kind(record, begin, end) for begin, end in found["offset_mapping"][:room]]
    longest = room - len(ids) if prompt is None else min(room - len(ids), prompt - len(tail) - 1)
    return Row(
        [tokenizer.bos_token_id, *head[:longest], *tail],
        [*ids, tokenizer.eos_token_id],
        [*kinds, "end of text"],
        record.completion[record.answer :],
    )


def encode_all(records: Sequence[Record], tokenizer: Any, context: int, prompt: int | None = None) -> list[Row]:
    """`encode` for every record."""
    return [encode(record, tokenizer, context, prompt) for record in records]


def completion_ids(rows: Sequence[Row]) -> NDArray[np.int64]:
    """All completion tokens in order, (M,)."""
    return np.asarray([token for row in rows for token in row.completion], dtype=np.int64)


def numbers(rows: Sequence[Row], tokenizer: Any) -> NDArray[np.bool_]:
    """Which completion tokens hold a digit, wherever they stand, (M,)."""
    digits = [i for i in range(len(tokenizer)) if any(letter.isdigit() for letter in tokenizer.decode([i]))]
    return np.isin(completion_ids(rows), digits)
