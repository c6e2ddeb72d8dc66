"""Time and memory of the scoring pass against the floor: one no-grad decoder forward plus the LM head on completion
positions.

    python -m tests.benchmarks.bench_scoring [--quick] [--repeats 5] [--markdown docs/benchmarks.md]

Random Llamas of about 30M and 150M parameters, padded batches of at most 4,096 tokens (the same ones for every
procedure). Times are medians over repeats that run the procedures in turn, so that a slow minute hits all of them; only
the ratios travel. Peak memory is what a fresh process's resident set grows by over its state after loading the model.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtf_plugin.documents import DocumentSet
from xtf_plugin.reference import Reference
from xtf_plugin.relevance import RelevanceTable
from xtf_plugin.scorer import plan_batches, score
from xtf_plugin.trial import against_own_forward

BUDGET = 4_096
VOCABULARY = 32_000
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}  # for tests
SIZES = {
    "30M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6},
    "150M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 12},
}
LENGTHS = {"short": (24, 50, 300), "long": (3, 1_000, 1_900)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_model(size: str, dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SIZES.get(size, TINY)
    heads = shape["num_attention_heads"]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        **shape,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype]).eval()


def make_documents(lengths: str | tuple[int, int, int], vocabulary: int = VOCABULARY) -> DocumentSet:
    """Random documents; the completion is the second 40-70 % of each, as in worked word problems.

    Args:
        lengths: a name out of `LENGTHS`, or how many documents and their fewest and most tokens.
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
    """The model as a reference; its one-off trial is not part of the pass."""
    if not hasattr(model, "tried"):
        reference = model.__dict__["tried"] = Reference(model, "bench")
        ids = torch.from_numpy(documents.document(0)[0][:128].astype(np.int64)).to(model.device)
        against_own_forward(reference, ids, 0.1, ())
    return model.__dict__["tried"]


def xtf(model, documents, layers, budget: int = BUDGET) -> None:
    reference = tried(model, documents)
    wanted = np.arange(len(documents))
    score(documents, wanted, reference, layers, lambda *_: None, batch_tokens=budget, progress=False)
    RelevanceTable(SimpleNamespace(domain="dataset", embedding="input"), documents, None).compute(reference)


PROCEDURES = {
    "decoder forward": decoder_only,
    "**floor** (decoder + LM head on completion)": floor,
    "forward with full logits": full_logits,
    "xtf, RI on the last layer": lambda m, d: xtf(m, d, (m.config.num_hidden_layers - 1,)),
    "xtf, RI on all layers": lambda m, d: xtf(m, d, tuple(range(m.config.num_hidden_layers))),
}
FLOOR = "**floor** (decoder + LM head on completion)"


def times(size: str, dtype: str, lengths: str, repeats: int) -> dict[str, float]:
    model, documents = make_model(size, dtype), make_documents(lengths)
    results: dict[str, list[float]] = {name: [] for name in PROCEDURES}
    for repeat in range(repeats + 1):
        for name, procedure in PROCEDURES.items():
            begin = time.perf_counter()
            procedure(model, documents)
            if repeat:  # the first round warms up
                results[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in results.items()}


def peak_megabytes(size: str, dtype: str, lengths: str, name: str) -> float:
    """Growth of the resident set's maximum over one run of a procedure, in a process of its own."""
    arguments = [sys.executable, "-m", "tests.benchmarks.bench_scoring", "--peak", size, dtype, lengths, name]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def print_peak(size: str, dtype: str, lengths: str, name: str) -> None:
    model, documents = make_model(size, dtype), make_documents(lengths)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 8, dtype=torch.long))  # thread pools and scratch buffers of the libraries
    reset_peak()
    before = resident("VmRSS")
    PROCEDURES[name](model, documents)
    print((resident("VmHWM") - before) / 1024)


def reset_peak() -> None:
    """Set the peak of the resident set to its present size (Linux)."""
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")


def resident(field: str) -> float:
    """The resident set, in kB: `VmRSS` now, `VmHWM` at its peak."""
    with open("/proc/self/status") as handle:
        return float(next(line.split()[1] for line in handle if line.startswith(field)))


def machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    flags = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as handle:
            flags = next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), flags)
    return (
        f"{torch.get_num_threads()} threads of {flags}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}; commit {commit or 'unknown'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30M only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    print(f"{machine()}\n")
    print("| model, dtype, lengths | procedure | ms | x floor | peak MB | x floor |\n|---|---|---:|---:|---:|---:|")
    for size in ("30M",) if options.quick else SIZES:
        for dtype in DTYPES:
            for lengths in LENGTHS:
                measured = times(size, dtype, lengths, options.repeats)
                peaks = {n: None if options.no_memory else peak_megabytes(size, dtype, lengths, n) for n in measured}
                for name, seconds in measured.items():
                    ratio = seconds / measured[FLOOR]
                    memory = "| |" if peaks[name] is None else f"{peaks[name]:.0f} | {peaks[name] / peaks[FLOOR]:.2f} |"
                    case = f"{size} {dtype} {lengths}"
                    print(f"| {case} | {name} | {seconds * 1e3:.0f} | {ratio:.2f} | {memory}", flush=True)


if __name__ == "__main__":
    main()
