"""Problems become rows of token ids with the true kind of every completion token; and base models get their text.

Pieces are tokenised one by one, in clean and in noisy text alike, so a piece's tokens never depend on its neighbours
and kinds need no alignment.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .grammar import FILLER_WORDS, FIXED, JUNK, OFF_TOPIC_WORDS, chatter
from .noise import FORMS, KINDS, plant
from .worlds import EOS, WORLDS, Line, Problem, fact_text, words

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<s>", "</s>", "<pad>"
VOCABULARY = 1280
SMALL = "small"  # a base of about a fifth of the weights: a reference may be smaller than the model that is trained
BASES: dict[str, tuple[str, ...]] = {  # what a base model reads, in equal parts
    "sums": ("sums", "sums", "sums", "chatter"),
    "programs": ("programs", "programs", "programs", "chatter"),
    "facts": ("facts", "facts", "facts", "chatter"),
    "both": ("sums", "sums", "sums", "programs", "programs", "programs", "chatter", "chatter"),
    "no_chatter": ("sums", "sums", "sums"),
    SMALL: ("sums", "sums", "sums", "chatter"),
}


@dataclass(frozen=True)
class Row:
    """One training row: prompt ids, completion ids with their kinds, and the answer as text."""

    prompt: list[int]
    completion: list[int]
    kinds: list[str]
    answer: str


@dataclass
class Encoder:
    """Pieces to token ids, each piece on its own."""

    tokenizer: PreTrainedTokenizerFast
    _cache: dict[str, list[int]] = field(default_factory=dict)

    def piece(self, text: str) -> list[int]:
        """Token ids of one piece."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def text(self, text: str) -> list[int]:
        """Token ids of a text, cut into words as solutions are."""
        return [token for word in words(text) for token in self.piece(word)]

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of a prompt, with BOS."""
        return [self.tokenizer.bos_token_id, *self.text(problem.text)]

    def row(self, problem: Problem, lines: Iterable[Line]) -> Row:
        """A training row; EOS ends the completion."""
        ids: list[int] = []
        kinds: list[str] = []
        for pieces in lines:
            for text, kind in pieces:
                tokens = self.piece(text)
                ids += tokens
                kinds += [kind] * len(tokens)
        return Row(self.prompt(problem), [*ids, self.tokenizer.eos_token_id], [*kinds, EOS], problem.answer)


def make_rows(
    world: str,
    number: int,
    rate: float,
    seed: int,
    encoder: Encoder,
    *,
    kinds: Sequence[str] = KINDS,
    forms: Sequence[str] = FORMS,
) -> list[Row]:
    """Training rows of a world with planted noise; no problem twice."""
    noise_rng = random.Random(f"noise {world} {seed} {rate}")  # the problems are the same at every rate
    return [
        encoder.row(problem, plant(problem, rate, noise_rng, kinds, forms) if rate else problem.lines)
        for problem in _distinct(world, number, random.Random(f"train {world} {seed}"), encoder)
    ]


def make_problems(world: str, number: int, seed: int, exclude: Iterable[Row], encoder: Encoder) -> list[Problem]:
    """Held-out problems, none of which is among the rows of `exclude`."""
    return _distinct(world, number, random.Random(f"held out {world} {seed}"), encoder, exclude)


def _distinct(
    world: str, number: int, rng: random.Random, encoder: Encoder, exclude: Iterable[Row] = ()
) -> list[Problem]:
    """Problems that differ from each other and from the rows of `exclude`.

    In place of a repeat comes a problem with the same verdict: "yes" has fewer pairs of people than "no", so its
    problems repeat more often, and without that it would be the rarer answer.
    """
    seen, problems = {tuple(row.prompt) for row in exclude}, []
    for _ in range(number):
        problem = WORLDS[world](rng)
        wanted = _verdict(problem)
        while tuple(encoder.prompt(problem)) in seen or _verdict(problem) != wanted:
            problem = WORLDS[world](rng)
        seen.add(tuple(encoder.prompt(problem)))
        problems.append(problem)
    return problems


def _verdict(problem: Problem) -> str:
    return problem.answer if problem.answer in ("yes", "no") else ""


def base_documents(parts: Sequence[str], number: int, seed: int, encoder: Encoder) -> list[list[int]]:
    """Clean text that a base model is trained on, as token ids with BOS and EOS."""
    rng, documents = random.Random(f"base {seed}"), []
    for index in range(number):
        part = parts[index % len(parts)]
        if part == "chatter":
            ids = encoder.text(chatter(rng))
        elif part == "facts" and rng.random() < 0.5:
            ids = encoder.text(fact_text(rng))
        else:
            problem = WORLDS[part](rng, base=True)
            row = encoder.row(problem, problem.lines)
            documents.append([*row.prompt, *row.completion])
            continue
        documents.append([encoder.tokenizer.bos_token_id, *ids, encoder.tokenizer.eos_token_id])
    rng.shuffle(documents)
    return documents


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over all worlds and all noise, as a real vocabulary has seen more than the data at hand."""
    rng = random.Random("tokenizer")
    texts = [" ".join(map(str, range(100))), " ".join((*FILLER_WORDS, *OFF_TOPIC_WORDS, *JUNK, *FIXED.values()))] * 60
    for _ in range(1500):
        for world in WORLDS.values():
            problem = world(rng)
            texts.append(problem.text + "".join(text for pieces in problem.lines for text, _ in pieces))
        texts.append(chatter(rng))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + text for text in texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=512
    )


def flat_kinds(rows: Sequence[Row]) -> Any:
    """Kinds of all completion tokens, in order, as a NumPy array of str."""
    import numpy as np

    return np.asarray([kind for row in rows for kind in row.kinds])
