"""What it takes to check a batch against a plan of documents that all have the same length.

    python -m tests.benchmarks.bench_verification [--write docs/benchmarks]

So it is with `wrapped` packing and with rows that are cut off at max_length. Batches of eight rows with an attention
mask, labels as planned. The index is built once, at the first batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from tests.benchmarks import reach
from tests.benchmarks.common import arguments, publish, seconds
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.training.verification import PlannedDocuments, verify_batch

HEAD = ["documents", "tokens each", "index, s", "a batch of 8, ms", "reach"]
ROWS = 8


def make_documents(n: int, length: int) -> DocumentSet:
    """Distinct documents of one length, the second half of each completion."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 32_000, (n, length), dtype=np.int32)
    return DocumentSet(
        keys=rng.integers(0, 256, (n, 16), dtype=np.uint8),
        counts=np.ones(n, dtype=np.int64),
        offsets=np.arange(n + 1, dtype=np.int64) * length,
        input_ids=ids.ravel(),
        completion=np.tile(np.arange(length) >= length // 2, n),
        row_offsets=np.arange(n + 1),
        row_documents=np.arange(n),
    )


def measure(n: int, length: int, repeats: int) -> tuple[float, float]:
    """Seconds to build the index; median seconds of a batch."""
    documents = make_documents(n, length)
    planned = PlannedDocuments(documents, np.tile(np.arange(length - length // 2) % 2 == 0, n))
    flags = np.zeros(length, dtype=bool)
    flags[length // 2 :] = planned.keep[: length - length // 2]
    rng, taken = np.random.default_rng(1), []
    documents.completion_offsets  # noqa: B018  (the plan has them)
    for _ in range(20 * repeats + 1):
        ids = np.stack([documents.document(int(at))[0] for at in rng.integers(0, n, ROWS)]).astype(np.int64)
        inputs = {"input_ids": ids, "labels": np.where(flags, ids, -100), "attention_mask": np.ones_like(ids)}
        batch = {name: torch.from_numpy(values) for name, values in inputs.items()}
        taken.append(seconds(lambda batch=batch: verify_batch(planned, batch)))
    return taken[0], statistics.median(taken[1:])


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(given)
    sizes = [(500, 16), (1_000, 16)] if options.smoke else [(20_000, 512), (1_000_000, 64), (1_000_000, 512)]
    rows = []
    for n, length in sizes:
        index, batch = measure(n, length, options.repeats)
        rows.append([f"{n:,}", str(length), f"{index:.2f}", f"{1e3 * batch:.2f}", reach.VERIFIED.judge(1e3 * batch)])
    publish("verification", f"medians of {20 * options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
