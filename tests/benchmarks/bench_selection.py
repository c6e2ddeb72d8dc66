"""Time and memory from scores to masks, for datasets of up to hundreds of millions of completion tokens.

    python -m tests.benchmarks.bench_selection [--millions 1 100] [--write docs/benchmarks]

Scores are drawn, not computed. Each row of the table is a process of its own: `select` with the rules of a preset, then
the table that the collator looks keep flags up in, several times over, of which the medians are taken. Memory is what
the resident set's peak grows by over its state with the scores loaded: what selecting costs, and not what there is to
select from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from tests.benchmarks import reach
from tests.benchmarks.common import arguments, peaks, publish
from xtf_plugin import XTFConfig
from xtf_plugin.selection.masks import MaskTable
from xtf_plugin.selection.select import Scores, select

MANY = 10**8  # tokens that the reach is stated for
HEAD = ["block", "completion tokens", "selection, s", "mask table, s", "ns a token", "memory, GB", "reach"]
MEAN = 170  # completion tokens of a document
SENTENCE = 20  # tokens of one
BLOCKS = {
    "default": {"preset": "default"},
    "paper": {"preset": "paper"},
    "three quantiles": {
        "preset": "paper",
        "reasoning_importance": {"drop": {"quantile": 0.05}, "scope": "document"},
        "knowledge_novelty": {"drop": {"quantile": 0.05}},
        "task_relevance": {"drop": {"quantile": 0.05}},
    },
}


def make_scores(tokens: int, config: XTFConfig) -> Scores:
    """Documents of 20 to 320 completion tokens with the scores that the block asks for."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 2 * MEAN - 20, tokens // MEAN)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    size = int(offsets[-1])

    def drawn(low: float, high: float) -> np.ndarray:
        return rng.random(size, dtype=np.float32) * np.float32(high - low) + np.float32(low)

    logprobs = drawn(-12, 0)
    ranges = {"attention_received": (0, 2), "embedding_similarity": (0, 1)}
    values = {
        name: logprobs if part.scorer == "novelty" else drawn(*ranges.get(part.scorer, (-6, 4)))
        for name, part in config.scores.items()
    }
    return Scores(
        keys=rng.integers(0, 256, (len(sizes), 16), dtype=np.uint8),
        offsets=offsets,
        counts=np.ones(len(sizes), dtype=np.int64),
        token_ids=rng.integers(0, 32_000, size, dtype=np.int32),
        positions=(np.arange(size) - np.repeat(offsets[:-1], sizes) + 100).astype(np.int32),
        values=values,
        logprobs=logprobs,
    )


def sentences(scores: Scores) -> dict[str, np.ndarray]:
    """First tokens of sentences of one length; a document begins one."""
    starts = np.concatenate([np.arange(low, high, SENTENCE) for low, high in itertools.pairwise(scores.offsets)])
    return {"sentence": starts}


def measure(block: str, tokens: int, repeats: int) -> tuple[int, float, float, float]:
    """Completion tokens; median seconds of the selection and of the mask table, and gigabytes that they take."""
    config = XTFConfig.parse(BLOCKS[block])
    assert config is not None
    scores, selecting, building = make_scores(tokens, config), [], []
    few = make_scores(10_000, config)
    select(few, config, segments=sentences(few))  # imports and first calls
    starts = sentences(scores)

    def run() -> None:
        begin = time.perf_counter()
        selection = select(scores, config, segments=starts)
        selecting.append(time.perf_counter() - begin)
        MaskTable.build(scores.keys, scores.offsets, selection.keep, selection.best)
        building.append(time.perf_counter() - begin - selecting[-1])

    memory = peaks(run, repeats)
    return len(scores.token_ids), *map(statistics.median, (selecting, building)), statistics.median(memory) / 1e3


def row(block: str, tokens: int, found: Sequence[float]) -> list[str]:
    """One row of the table."""
    size, selecting, building, memory = found
    both = selecting + building
    verdict = f"{reach.SELECTION.judge(both)}, {reach.SELECTION_MEMORY.judge(memory)}" if tokens == MANY else ""
    cells = [f"{selecting:.2f}", f"{building:.2f}", f"{1e9 * both / size:.0f}", f"{memory:.2f}", verdict]
    return [block, f"{size / 1e6:g} M" if size < 1e6 else f"{size / 1e6:.0f} M", *cells]


def apart(block: str, tokens: int, repeats: int) -> list[float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_selection", "--row", block, str(tokens)]
    output = subprocess.run([*command, "--repeats", str(repeats)], check=True, capture_output=True, text=True).stdout
    found: list[float] = json.loads(output.splitlines()[-1])
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 100], help="completion tokens")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.row:
        print(json.dumps(measure(options.row[0], int(options.row[1]), options.repeats)))
        return
    sizes = [30_000] if options.smoke else [millions * 10**6 for millions in options.millions]
    run = measure if options.smoke else apart
    rows = [row(block, tokens, run(block, tokens, options.repeats)) for block in BLOCKS for tokens in sizes]
    publish("selection", f"medians of {options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
