"""The scoring pass against the procedure that was published with the method, restated here from its description.

    python -m tests.benchmarks.bench_authors [--lengths short] [--all-tokens] [--write docs/benchmarks]

That procedure takes one document at a time, three times over: a forward with attention maps of all layers in memory, of
which the first layer's is averaged; a forward with logits of all positions and a softmax over the vocabulary; and for
relevance one forward of its own for every distinct completion token. The tokens here are drawn at random from 32,000,
so that nearly all are distinct, which is the procedure's bad case; the rows without the third pass do not depend on it.
Those forwards are all of one token, so that some of them are timed and stand for all (`--all-tokens`: all are run).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from tests.benchmarks import reach
from tests.benchmarks.bench_scoring import DTYPES, LENGTHS, floor, make_documents, make_model, xtf
from tests.benchmarks.common import NOT_MEASURED, arguments, device, in_turn, publish

SAMPLE = 300  # of the distinct tokens
HEAD = ["device, dtype, lengths", "procedure", "ms", "x ours", "x floor", "reach, x ours"]


@contextmanager
def eager(model):
    """Attention that has its maps in memory, as whoever asks for them needs it."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def one_by_one(model, documents):
    for index in range(len(documents)):
        ids, completion = documents.document(index)
        yield torch.from_numpy(ids.astype(np.int64))[None].to(model.device), torch.from_numpy(completion)


@torch.no_grad()
def attention_pass(model, documents) -> list[torch.Tensor]:
    """The first layer's map averaged over heads, then over keys; all layers' maps are there."""
    with eager(model):
        return [
            model(input_ids=ids, output_attentions=True).attentions[0][0].mean(0).mean(-1).cpu()
            for ids, _ in one_by_one(model, documents)
        ]


@torch.no_grad()
def probability_pass(model, documents) -> list[torch.Tensor]:
    """The probability of every token, out of a softmax over the vocabulary at every position."""
    found = []
    with eager(model):
        for ids, _ in one_by_one(model, documents):
            probabilities = model(input_ids=ids).logits[0, :-1].float().softmax(-1)
            found.append(probabilities.gather(-1, ids[0, 1:, None])[:, 0].cpu())
    return found


@torch.no_grad()
def token_pass(model, tokens: Sequence[int]) -> list[torch.Tensor]:
    """The last hidden state of each token run alone."""
    with eager(model):
        return [
            model(input_ids=torch.tensor([[token]], device=model.device), output_hidden_states=True)
            .hidden_states[-1][0, -1]
            .cpu()
            for token in tokens
        ]


def measure(model, documents, repeats: int, all_tokens: bool = False) -> dict[str, float]:
    """Seconds of the floor, of ours, and of the published procedure without and with its third pass."""
    distinct = np.unique(documents.input_ids[documents.completion]).tolist()
    some = distinct if all_tokens else distinct[:: max(1, len(distinct) // SAMPLE)]
    layers = model.config.num_hidden_layers
    found = in_turn(
        {
            "floor": partial(floor, model, documents),
            "last": partial(xtf, model, documents, (layers - 1,)),
            "all": partial(xtf, model, documents, tuple(range(layers))),
            "attention": partial(attention_pass, model, documents),
            "probability": partial(probability_pass, model, documents),
            "tokens": partial(token_pass, model, some),
        },
        repeats,
    )
    two = found["attention"] + found["probability"]
    tokens = found["tokens"] * len(distinct) / len(some)
    return {
        "floor: decoder and LM head on completions": found["floor"],
        "**ours**, all three attributes, one layer": found["last"],
        "ours, all three attributes, all layers": found["all"],
        "the authors', importance and novelty": two,
        f"the authors', all three ({len(distinct):,} distinct tokens)": two + tokens,
    }


def rows_of(case: str, found: dict[str, float], goal: reach.Reach | None) -> list[list[str]]:
    base, ours = list(found.values())[:2]
    rows = []
    for name, took in found.items():
        told = goal.judge(took / ours) if goal and "all three (" in name else "–"
        rows.append([case, name, f"{took * 1e3:.0f}", f"{took / ours:.1f}", f"{took / base:.1f}", told])
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--all-tokens", action="store_true", help="run a forward for every distinct token")
    options = parser.parse_args(given)
    where, rows = device(), []
    for dtype in DTYPES:
        for lengths in ("short",) if options.smoke else options.lengths:
            model = make_model("tiny" if options.smoke else "30M", dtype)
            documents = make_documents((2, 20, 30) if options.smoke else lengths)
            found = measure(model.to(where), documents, options.repeats, options.all_tokens)
            goal = reach.AUTHORS.get(f"{where.type} {dtype}") if lengths == "short" else None
            rows += rows_of(f"{where.type} {dtype} {lengths}", found, goal)
    if where.type == "cpu":
        rows.append(["cuda bf16 short", "the authors', all three", *[NOT_MEASURED] * 3, str(reach.AUTHORS[reach.CUDA])])
    name = "tiny" if options.smoke else "30M"
    publish("bench_authors", f"{name} model, medians of {options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
