"""Time and memory of the scoring pass against the floor: one no-grad decoder forward plus the LM head on completion
positions.

    python -m tests.benchmarks.bench_scoring [--sizes 30M 150M] [--no-memory] [--write docs/benchmarks]

Random Llamas of about 30M and 150M parameters, in the same padded batches of at most 4,096 tokens for every procedure.
Times are medians over rounds that run the procedures in turn, so that a slow period affects all of them. Only ratios
carry over to other machines; the lowest and highest of single rounds are given too. Peak memory is the growth of the
resident set of a separate process after loading the model, without the code of libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import reach
from tests.benchmarks.common import arguments, peaks, publish, rounds
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.scorers import ScoringContext, embedding_similarity
from xtf_plugin.scoring.batching import plan_batches
from xtf_plugin.scoring.engine import gather_vectors, score
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.scoring.self_check import against_own_forward

BUDGET = 4_096
VOCABULARY = 32_000
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}  # for tests
SIZES = {
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6},
    "150M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 12},
}
LENGTHS = {"short": (24, 50, 300), "long": (3, 1_000, 1_900)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_model(size: str, dtype: str, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SIZES.get(size, TINY)
    heads = shape["num_attention_heads"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        **shape,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype]).eval()


def make_documents(lengths: str | tuple[int, int, int], vocabulary: int = VOCABULARY) -> DocumentSet:
    """Random documents; the completion is the second 40-70 % of each, as in worked word problems.

    Args:
        lengths: a name in `LENGTHS`, or the number of documents and their fewest and most tokens.
    """
    count, low, high = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    rng = np.random.default_rng(0)
    sizes = rng.integers(low, high + 1, count)
    masks = []
    for size in sizes:
        mask = np.ones(size, dtype=bool)
        mask[: int(size * rng.uniform(0.3, 0.6))] = False
        masks.append(mask)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return DocumentSet(
        keys=rng.integers(0, 256, (count, 16), dtype=np.uint8),
        counts=np.ones(count, dtype=np.int64),
        offsets=offsets,
        input_ids=rng.integers(0, vocabulary, offsets[-1], dtype=np.int32),
        completion=np.concatenate(masks),
        row_offsets=np.arange(count + 1),
        row_documents=np.arange(count),
    )


def batches(documents: DocumentSet, device: torch.device | str = "cpu", budget: int = BUDGET):
    for batch in plan_batches(documents.lengths, budget):
        T = int(documents.lengths[batch].max())
        ids = torch.zeros(len(batch), T, dtype=torch.long)
        predicted = torch.zeros(len(batch), T, dtype=torch.bool)
        for row, index in enumerate(batch):
            tokens, mask = documents.document(int(index))
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            predicted[row, : len(tokens)] = torch.from_numpy(mask)
        predicted[:, 0] = False
        yield ids.to(device), predicted.to(device)


@torch.no_grad()
def decoder_only(model, documents) -> None:
    for ids, _ in batches(documents):
        model.model(input_ids=ids, use_cache=False)


@torch.no_grad()
def floor(model, documents, budget: int = BUDGET) -> None:
    for ids, predicted in batches(documents, model.device, budget):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, :-1][predicted[:, 1:]])


@torch.no_grad()
def full_logits(model, documents) -> None:
    for ids, _ in batches(documents):
        model(input_ids=ids, use_cache=False)


def tried(model, documents) -> Reference:
    """The model as a reference, after its self-check, which is not part of the pass."""
    if not hasattr(model, "tried"):
        reference = model.__dict__["tried"] = Reference(model, "bench")
        ids = torch.from_numpy(documents.document(0)[0][:128].astype(np.int64)).to(model.device)
        against_own_forward(reference, ids, 0.1, ())
    return model.__dict__["tried"]


def xtf(model, documents, layers, budget: int = BUDGET) -> None:
    reference = tried(model, documents)
    wanted = np.arange(len(documents))
    score(documents, wanted, reference, layers, lambda *_: None, batch_tokens=budget, progress=False)
    relevance(reference, documents)


def relevance(reference, documents) -> np.ndarray:
    """Task relevance of the documents' tokens."""
    source = SimpleNamespace(
        embeddings=lambda ids, kind: gather_vectors(reference, ids, kind).numpy(),
        vocabulary_table=lambda key, compute: compute(),
    )
    similarity = embedding_similarity.embedding_similarity
    config = similarity.Config(scorer=similarity.name)
    return similarity.score(ScoringContext(documents, None, source), config)


FLOOR, ONE, ALL = "**floor** (decoder + LM head on completion)", "xtf, RI on the last layer", "xtf, RI on all layers"
PROCEDURES = {
    "decoder forward": decoder_only,
    FLOOR: floor,
    "forward with full logits": full_logits,
    ONE: lambda m, d: xtf(m, d, (m.config.num_hidden_layers - 1,)),
    ALL: lambda m, d: xtf(m, d, tuple(range(m.config.num_hidden_layers))),
}
NO_PEAK = ("decoder forward",)  # the floor's is never below it
HEAD = ["model, dtype, lengths", "procedure", "ms", "x floor", "single rounds", "peak MB", "x floor", "reach"]


def times(size: str, dtype: str, lengths: str | tuple[int, int, int], repeats: int) -> dict[str, list[float]]:
    """Seconds of each procedure, by round."""
    model, documents = make_model(size, dtype), make_documents(lengths)
    return rounds({name: partial(procedure, model, documents) for name, procedure in PROCEDURES.items()}, repeats)


def peak(size: str, dtype: str, lengths: str | tuple[int, int, int], name: str, repeats: int) -> float:
    """Peak memory of a procedure in MB, the median of several runs, in a process that has run nothing else."""
    model, documents = make_model(size, dtype), make_documents(lengths)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 8, dtype=torch.long))  # thread pools and scratch buffers of the libraries
    return statistics.median(peaks(partial(PROCEDURES[name], model, documents), repeats))


def peak_apart(*case: str | int) -> float:
    """`peak` in a separate process."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_scoring", "--peak", *map(str, case)]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def rows_of(case: str, reached: str, found: dict[str, list[float]], memory: dict[str, float]) -> list[list[str]]:
    """Rows of the table for one model, dtype and kind of documents; `reached` names the figures to compare with."""
    base, rows = statistics.median(found[FLOOR]), []
    for name, took in found.items():
        median = statistics.median(took)
        single = [one / other for one, other in zip(took, found[FLOOR], strict=True)]
        spread = "" if name == FLOOR else f"{min(single):.2f}-{max(single):.2f}"
        cells = [f"{median * 1e3:.0f}", f"{median / base:.3f}", spread]
        against = [reach.scoring(name == ALL, reached).judge(median / base)] if name in (ONE, ALL) else []
        if name in memory:
            ratio = memory[name] / memory[FLOOR]
            cells += [f"{memory[name]:.0f}", f"{ratio:.2f}"]
            against += [f"memory {reach.MEMORY.judge(ratio)}"] if against else []
        else:
            cells += ["", ""]
        rows.append([case, name, *cells, "; ".join(against)])
    return rows


def measure(size: str, repeats: int, memory: bool) -> list[list[str]]:
    """All rows of one model."""
    rows = []
    for dtype in DTYPES:
        for lengths in LENGTHS:
            runs = {name: repeats if name in (FLOOR, ONE, ALL) else 1 for name in PROCEDURES if name not in NO_PEAK}
            taken = {name: peak_apart(size, dtype, lengths, name, n) for name, n in runs.items()} if memory else {}
            rows += rows_of(f"{size} {dtype} {lengths}", f"cpu {dtype}", times(size, dtype, lengths, repeats), taken)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30M"])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.peak:
        *case, repeats = options.peak
        print(json.dumps(peak(*case, int(repeats))))
        return
    for size in options.sizes:
        if options.smoke:
            few = (3, 20, 40)
            memory = {name: peak("tiny", "fp32", few, name, options.repeats) for name in (FLOOR, ONE, ALL)}
            rows = rows_of("tiny", reach.FP32, times("tiny", "fp32", few, options.repeats), memory)
        else:
            rows = measure(size, options.repeats, not options.no_memory)
        publish(f"scoring {size}", f"medians of {options.repeats}", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
