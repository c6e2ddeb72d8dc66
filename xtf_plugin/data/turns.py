"""What a chat template writes around an answer, found by rendering one: the mark that ends a turn, and insertions.

A mark such as `<|im_end|>` is a special token of some tokenizers and ordinary text to others, which cut it into pieces.
Protecting special tokens alone would let a rule drop these pieces, and the model would never learn to stop.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import XTFError
from .documents import DocumentSet
from .formats import MARK
from .ragged import Bools, Ints
from .token_text import match_spans, token_bytes

_WITHOUT_PART = re.compile(r"[<\[{][^<>\[\]{}]*\Z")  # of two marks that begin alike, such as `<|user|>` and `<|end|>`
_ASKED, _ANSWER = "xtf-question", "xtf-answer"


def rendered(render: Callable[[], str]) -> str | None:
    """What a chat template writes; None if it fails, by whatever its code raises."""
    try:
        return render()
    except Exception as error:  # a template is a program
        if isinstance(error, XTFError):
            raise
        return None


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes, without whitespace at the ends; empty: nothing, or there is no template.

    Args:
        ends: after the answers: the last one, and every one.
        inserted: between the prompt for an answer and its text.
        known: whether the template rendered a conversation; otherwise the texts are empty.
    """

    ends: tuple[str, ...] = ()
    inserted: str = ""
    known: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> TurnTexts:
        """Render a conversation of two turns; a template that refuses it gives empty texts."""
        write = getattr(tokenizer, "apply_chat_template", None)
        if write is None:
            return cls()
        turn = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}]
        whole = rendered(lambda: str(write([*turn, *turn], tokenize=False)))
        asked = rendered(lambda: str(write(turn[:1], tokenize=False, add_generation_prompt=True)))
        once = rendered(lambda: str(write(turn, tokenize=False)))
        if whole is None or asked is None or once is None:
            return cls()
        if once.count(_ANSWER) != 1 or whole.count(_ANSWER) != 2:
            return cls()
        before, last = once.split(_ANSWER)
        between = whole.split(_ANSWER)[1].split(_ASKED)[0]
        inserted = before.removeprefix(asked) if before.startswith(asked) else ""
        ends = {last.strip(), _WITHOUT_PART.sub("", os.path.commonprefix([last, between])).strip()} - {""}
        return cls(tuple(sorted(ends, key=len, reverse=True)), inserted.strip(), True)


@dataclass(frozen=True)
class Turns:
    """How the runs of completion tokens (answers, turns) begin and end.

    Args:
        texts: what the template writes.
        marks: (M,) completion tokens of end marks that are ordinary text; None: none.
        documents: (R,) the document of each run.
        last: (R,) its last completion token that is not whitespace alone; -1: none.
        ended: (R,) whether that is an end mark or a special token.
        inserted: (R,) whether the run begins with what the template inserts.
    """

    texts: TurnTexts
    marks: Bools | None
    documents: Ints
    last: Ints
    ended: Bools
    inserted: Bools

    @classmethod
    def find(
        cls, documents: DocumentSet, tokenizer: Any, special_ids: ArrayLike, texts: TurnTexts | None = None
    ) -> Turns:
        """Look at the runs of completion tokens of some documents.

        Args:
            documents: with M completion tokens in R runs.
            tokenizer: of the training, with its chat template.
            special_ids: ids of special tokens.
            texts: of the tokenizer, if they are known.
        """
        ids, offsets = documents.completion_ids, documents.completion_runs
        starts, stops = offsets[:-1], offsets[1:]
        texts = texts or TurnTexts.of(tokenizer)
        special, marks = np.isin(ids, np.asarray(special_ids)), None
        ends = [re.escape(end) for end in texts.ends if not _is_special(tokenizer, end, special_ids)]
        if ends:
            # a mark with a sign is found wherever it is, since a run may hold several turns; a word only at an end
            anywhere = all(MARK.search(end) for end in texts.ends)
            marks = match_spans(tokenizer, ids, offsets, [f"(?:{'|'.join(ends)})" + ("" if anywhere else r"(?=\s*\Z)")])
        last = _last_of_text(tokenizer, ids, starts, stops)
        closing = special if marks is None else special | marks
        inserted = np.zeros(len(starts), dtype=bool)
        if texts.inserted:
            inserted = _begin_with(tokenizer, ids, starts, stops, texts.inserted)
        owners = np.searchsorted(documents.completion_offsets, starts, side="right") - 1
        return cls(texts, marks, owners, last, (last >= 0) & closing[last], inserted)

    def warnings(self, keep: Bools, counts: Ints) -> list[str]:
        """Warnings about ends that are never trained, and insertions that are.

        Args:
            keep: (M,) keep flags; counts: (N,) occurrences of the documents.
        """
        weights, found = counts[self.documents], []
        total, ended = int(weights.sum()), int(weights[self.ended].sum())
        lost = int(weights[self.ended & ~keep[self.last]].sum())
        if total and not ended:
            what = "the chat template writes no end mark"
            if self.texts.ends:
                what = f"the chat template writes {self.texts.ends[-1]!r} after an answer, but it has no label"
            found.append(
                f"none of {total:,} answers ends with an end of turn that is trained, so the model does not learn to "
                f"stop: {what}, or every answer is cut off (max_length). Let the template write one inside its "
                "{% generation %} block, or train on it (train_on_eos, train_on_eot in Axolotl)"
            )
        if lost > ended / 2:
            found.append(
                f"the rules drop the end of turn of {lost:,} of {ended:,} answers, so the model does not learn to "
                "stop. Set protect: {special_tokens: true}"
            )
        if number := int(weights[self.inserted].sum()):
            found.append(
                f"{number:,} of {total:,} answers train on {self.texts.inserted!r}, which the chat template writes by "
                "itself where the data has none: the model learns to write it always. Leave it out of the "
                "{% generation %} block if that is not meant"
            )
        return found

    def unended(self, counts: Ints) -> int:
        """Occurrences of documents whose last completion does not end with an end of turn."""
        last = np.append(np.diff(self.documents) > 0, True)[: len(self.documents)]
        return int(counts[self.documents[last & ~self.ended]].sum())


def _is_special(tokenizer: Any, text: str, special_ids: ArrayLike) -> bool:
    """Whether a text consists of special tokens and whitespace."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    others = [index for index in ids if index not in np.asarray(special_ids)]
    return not b"".join(token_bytes(tokenizer, others)).strip()


def _last_of_text(tokenizer: Any, ids: NDArray[Any], starts: Ints, stops: Ints) -> Ints:
    """The last token of each run that is not whitespace alone, (R,); -1: there is none."""
    last, moving = stops - 1, np.flatnonzero(stops > starts)
    while len(moving):
        distinct, which = np.unique(ids[last[moving]], return_inverse=True)
        blank = np.asarray([not piece.strip() for piece in token_bytes(tokenizer, distinct.tolist())])
        moving = moving[blank[which.reshape(-1)]]
        last[moving] -= 1
        moving = moving[last[moving] >= starts[moving]]
    return np.where(last >= starts, last, -1)


def _begin_with(tokenizer: Any, ids: NDArray[Any], starts: Ints, stops: Ints, text: str) -> Bools:
    """Which runs begin with a text, whitespace aside, (R,)."""
    wanted, found = "".join(text.split()), {}
    result = np.zeros(len(starts), dtype=bool)
    size = 2 * len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for run, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        head = tuple(ids[start : min(stop, start + size)].tolist())
        if head not in found:
            spelt = b"".join(token_bytes(tokenizer, head)).decode(errors="replace")
            found[head] = "".join(spelt.split()).startswith(wanted)
        result[run] = found[head]
    return result
