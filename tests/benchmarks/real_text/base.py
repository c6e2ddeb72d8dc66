"""A base model of its own, trained from scratch on the pretrain parts, and the losses of any model on given rows.

No model can be downloaded where this runs, and a model of a million parameters is what one CPU core can train in a
quarter of an hour. It learns the form of the three data sets, hardly any arithmetic and no medicine: what is measured
with it says how the rules behave on real text, not what a large model would gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.proof.data import Row
from tests.benchmarks.proof.models import batches, device, padded, train_base

from .encode import ANSWER, encode_all, train_tokenizer
from .records import DECISIONS, Record
from .stages import Scale

Parts = Mapping[str, Mapping[str, list[Record]]]
Losses = NDArray[np.float64]


def make_base(parts: Parts, target: Path, scale: Scale, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train tokenizer and model on the pretrain parts, save both, and say how well the model predicts unseen rows."""
    records = [record for by_part in parts.values() for record in by_part["pretrain"]]
    texts = [record.head + record.tail + record.completion for record in records]
    tokenizer = train_tokenizer(texts, scale.vocabulary, scale.context)
    rows = encode_all(records, tokenizer, scale.context)
    documents = [row.prompt + row.completion for row in rows]
    log(f"base model: {len(documents)} documents, {sum(map(len, documents)):,} tokens")
    model = train_base(documents, tokenizer, scale.base, log)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    held_out = {}
    for name, by_part in parts.items():
        found = encode_all(by_part["held-out"], tokenizer, scale.context)
        whole = [Row(row.prompt[:1], row.prompt[1:] + row.completion, [], "") for row in found]
        held_out[name] = [float(examine(model, some).mean()) for some in (whole, found)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "held_out": held_out,
    }


def load(target: Path) -> tuple[Any, Any]:
    """The base model, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device())
    return model.eval(), AutoTokenizer.from_pretrained(target)


@torch.no_grad()
def examine(model: Any, rows: Sequence[Row]) -> Losses:
    """Negative log-probability of every completion token with plain labels, in nats, in the order of the rows, (M,)."""
    parts: list[Losses] = [np.empty(0)] * len(rows)
    for chosen, ids, logits in _passes(model, rows):
        for place, index in enumerate(chosen):
            row = rows[index]
            begin, end = len(row.prompt), len(row.prompt) + len(row.completion)
            logprobs = logits[place, begin - 1 : end - 1].float().log_softmax(-1)
            own = logprobs.gather(-1, ids[place, begin:end, None])[:, 0]
            parts[index] = -own.cpu().numpy().astype(np.float64)
    return np.concatenate(parts)


@torch.no_grad()
def decision_accuracy(model: Any, rows: Sequence[Row], tokenizer: Any) -> float:
    """Share of rows whose decision is the likeliest of yes, no and maybe, given the true text before it.

    NaN if the tokenizer does not begin the three with three different tokens.
    """
    first = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in DECISIONS}
    places = [len(row.prompt) + row.kinds.index(ANSWER) if ANSWER in row.kinds else None for row in rows]
    if len(set(first.values())) < len(first) or not any(places):
        return float("nan")
    options, right = torch.tensor(list(first.values()), device=model.device), []
    for chosen, ids, logits in _passes(model, rows):
        for row, index in enumerate(chosen):
            place = places[index]
            if place is not None:
                best = options[logits[row, place - 1, options].argmax()]
                right.append(bool(best == ids[row, place]))
    return float(np.mean(right))


def _passes(model: Any, rows: Sequence[Row]) -> Any:
    """Batches of rows of like length: (indices, ids (B, T), logits (B, T, V))."""
    import random

    was_training = model.training
    model.eval()
    documents = [row.prompt + row.completion for row in rows]
    for chosen in batches(documents, 4_096, random.Random(0)):
        ids = padded([documents[i] for i in chosen], 0).to(model.device)
        yield chosen, ids, model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
