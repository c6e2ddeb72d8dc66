"""The share of padding in the batches of a scoring pass.

    python -m tests.benchmarks.bench_padding [--data FOLDER] [--write docs/benchmarks]

Lengths are those of a generated log-normal mix and, with a folder that holds the public files of `proof.texts`, of
their documents under the tokenizer of SmolLM2 (`make models`). Nothing depends on a device. A CPU has padded
batches of a fixed size. A GPU packs documents in rows without padding, unless a model refuses packed rows or its
weights are split between ranks. Its batches are then padded: of a fixed size for split weights and in streams, else as
large as memory allows, up to the largest size here. For comparison: batches that are filled in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tests import real
from tests.benchmarks import reach
from tests.benchmarks.common import arguments, publish
from tests.benchmarks.proof import texts
from xtf_plugin.scoring.batching import MAX_BATCH_TOKENS, default_batch_tokens, plan_batches

FIXED = {where: default_batch_tokens(torch.device(where)) for where in ("cpu", "cuda")}
BUDGETS = {"CPU": FIXED["cpu"], "GPU if padded, fixed": FIXED["cuda"], "GPU if padded, at most": MAX_BATCH_TOKENS}
HEAD = ["documents", "tokens a batch", "padding", "batches", "padding if filled in order", "batches", "reach"]


def generated(count: int) -> NDArray[np.int64]:
    """A mix of lengths with a long tail: half of the documents have at most 200 tokens, the longest 2,048."""
    return np.random.default_rng(0).lognormal(np.log(200), 0.7, count).clip(8, 2_048).astype(np.int64)


def of_texts(folder: Path) -> dict[str, NDArray[np.int64]]:
    """Lengths of whole documents of the data sets, prompt and completion, with the tokens that begin and end one."""
    tokenizer, found = real.tokenizer(real.SMOLLM2), {}
    for name in ("GSM8K", "PubMedQA", "HumanEval"):
        documents = [example.prompt + example.completion for example in texts.CLEAN[name](folder)]
        found[name] = np.asarray([len(ids) + 2 for ids in tokenizer(documents)["input_ids"]], dtype=np.int64)
    return found


def in_order(lengths: NDArray[np.int64], budget: int) -> Iterable[NDArray[np.int64]]:
    """The longest documents left, as many as the budget takes."""
    order, low = np.argsort(-lengths, kind="stable"), 0
    while low < len(order):
        size = max(1, budget // int(lengths[order[low]]))
        yield order[low : low + size]
        low += size


def padding(lengths: NDArray[np.int64], batches: Iterable[NDArray[np.int64]]) -> tuple[float, int]:
    """Share of padding among all positions that are read, and the number of batches."""
    sizes = [len(batch) * int(lengths[batch].max()) for batch in batches]
    return 1 - int(lengths.sum()) / sum(sizes), len(sizes)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder with the real documents")
    options = parser.parse_args(given)
    mixes = {"log-normal": generated(300 if options.smoke else 10_000)}
    if options.data is not None:
        mixes |= of_texts(options.data)
    rows = []
    for name, lengths in mixes.items():
        for where, budget in BUDGETS.items():
            share, count = padding(lengths, plan_batches(lengths, budget))
            plain, fewest = padding(lengths, in_order(lengths, budget))
            what = f"{name}, {len(lengths):,}, mean {lengths.mean():.0f} tokens"
            cells = [f"{share:.1%}", str(count), f"{plain:.1%}", str(fewest), reach.PADDING.judge(share)]
            rows.append([what, f"{budget:,} ({where})", *cells])
    publish("bench_padding", "counted, not timed", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
