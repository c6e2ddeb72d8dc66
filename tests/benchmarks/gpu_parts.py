"""The parts of `bench_gpu`: each measures the sizes it is given and yields rows of the table.

A random Llama of about a billion parameters in bfloat16 for what can be compared with a floor; kernels alone; and the
benchmarks of a training step, of a whole run and of other references, on that model where size matters.

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head or hidden size, V vocabulary, N picked tokens.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import bench_authors, bench_run, bench_step, reach
from tests.benchmarks.bench_scoring import floor, make_documents, make_model, xtf
from tests.benchmarks.common import device, in_turn, peak_allocated, rounds
from xtf_plugin.scoring.kernels import dispatch, triton_dispatch
from xtf_plugin.scoring.kernels.eager import AttentionSpec

BF16 = torch.bfloat16
Rows = Iterator[list[str]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements; `SMOKE` only checks that they run."""

    lengths: tuple[int, ...] = (512, 2_048, 8_192)
    tokens: int = 16_384  # of a batch
    budgets: tuple[int, ...] = (4_096, 16_384, 32_768)  # of batches with weights in 4 bits
    H: int = 32
    K: int = 8
    D: int = 64
    hidden: int = 2_048
    intermediate: int = 8_192
    layers: int = 16
    V: int = 128_256
    N: int = 8_192
    authors: str = "30M"
    authors_documents: tuple[int, int, int] = (24, 50, 300)  # those of the table for CPUs
    documents: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"short": (400, 50, 300), "long": (40, 1_000, 1_900), "8,192": (8, 8_192, 8_192)}
    )
    rows: int = 96  # of a training run
    steps: int = -1  # of it; -1: three epochs

    @property
    def config(self) -> LlamaConfig:
        """The model of a billion parameters."""
        return LlamaConfig(
            vocab_size=self.V,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.H,
            num_key_value_heads=self.K,
            max_position_embeddings=8_192,
            tie_word_embeddings=True,
        )


FEW = {"short": (4, 20, 40), "long": (2, 60, 90), "8,192": (2, 100, 100)}
SMOKE = Sizes((40,), 120, (60, 120), 4, 2, 16, 64, 128, 2, 512, 70, "tiny", (2, 20, 30), FEW, 8, 1)


def large_model(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM(sizes.config).to(BF16).eval()


def of(count: int, wanted: int) -> str:
    """A note for fewer repeats than wanted."""
    return "" if count == wanted else f", median of {count}"


def scoring(which: str, sizes: Sizes, repeats: int, until: float) -> Rows:
    """The pass over the floor, and both their peaks."""
    lengths, budget, layers = sizes.documents[which], sizes.tokens, tuple(range(sizes.layers))
    model, documents = large_model(sizes), make_documents(lengths, sizes.V)
    procedures = {
        "floor": partial(floor, model, documents, budget),
        "xtf, RI on the last layer": partial(xtf, model, documents, layers[-1:], budget),
        "xtf, RI on all layers": partial(xtf, model, documents, layers, budget),
    }
    times = rounds(procedures, repeats, until)
    memory = {name: peak_allocated(procedure) for name, procedure in procedures.items()}
    base = statistics.median(times["floor"])
    for name, took in times.items():
        ratio, taken = statistics.median(took) / base, memory[name] / memory["floor"]
        cell, goal = f"{ratio:.3f} x floor{of(len(took), repeats)}", "–"
        if name != "floor":
            goal = reach.scoring("all" in name, reach.CUDA, lengths[-1]).judge(ratio)
        if torch.cuda.is_available():
            cell += f"; {memory[name]:,.0f} MB, {taken:.2f} x"
            goal += "" if name == "floor" else f"; memory {reach.MEMORY.judge(taken)}"
        yield [f"scoring, {which}", name, f"{ratio * base * 1e3:.0f}", cell, goal]


def authors(sizes: Sizes, repeats: int, until: float) -> Rows:
    """The published procedure, restated."""
    del until
    model = make_model(sizes.authors, "bf16").to(device())
    found = bench_authors.measure(model, make_documents(sizes.authors_documents), repeats)
    for case, what, ms, ours, base, goal in bench_authors.rows_of("authors", found, reach.AUTHORS[reach.CUDA]):
        yield [case, what, ms, f"{ours} x ours, {base} x floor", goal]


def step(sizes: Sizes, repeats: int, until: float) -> Rows:
    """A training step with masks and without, and what the collator takes of it."""
    del until
    measured = bench_step.measure(sizes.config, repeats, True)
    for case, what, ms, ratio, added, share, goal in bench_step.rows_of("step", *measured):
        collator = "" if added == "–" else f"; collator {added} ms, {share}"
        yield [case, what, ms, f"{ratio} x plain{collator}", goal]


def run(sizes: Sizes, repeats: int, until: float) -> Rows:
    """A QLoRA run without XTF and with it, in this process, so that the time includes no imports.

    To random weights prompts say nothing: the default reads all that it always reads, and asks about no doubtful text.
    """
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name)
        large_model(sizes).save_pretrained(kept / "model")

        def save(folder: Path) -> None:
            (folder / "model").symlink_to(kept / "model", target_is_directory=True)

        def one(variant: str, folder: Path, steps: int = sizes.steps) -> dict[str, float]:
            found = bench_run.run(variant, folder, sizes.rows, steps)
            gc.collect()
            return found

        variants = (bench_run.PLAIN, bench_run.DEFAULT)
        bench_run.measure(partial(one, steps=1), save, variants, 1)  # kernels are compiled and tuned once
        found, count = bench_run.measure(one, save, variants, repeats, until)
    for cells in bench_run.rows_of(found):
        variant, _, ratio, before, goal = *cells[:4], cells[-1]
        took, scored = found[variant]["train"], found[variant]["scoring"]
        parts = "" if before == "–" else f"; {before} s before step 1, {scored:.2f} s of it scoring"
        yield ["run", variant, f"{took * 1e3:.0f}", f"{ratio} x without{of(count, repeats)}{parts}", goal]


def quantise(model: LlamaForCausalLM) -> None:
    """Replace the decoder's linear layers by 4-bit ones, as loading with `load_in_4bit` does."""
    for module in list(model.model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                small = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=BF16
                )
                small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, small.to(device()))


def quantised(sizes: Sizes, repeats: int, until: float) -> Rows:
    """The floor, and the pass, with weights in 4 bits, in batches of several sizes."""
    plain, small, documents = large_model(sizes), large_model(sizes), make_documents(sizes.documents["short"], sizes.V)
    quantise(small)
    procedures: dict[str, Callable[[], None]] = {}
    for budget in sizes.budgets:
        procedures[f"floor, bf16, batches of {budget:,}"] = partial(floor, plain, documents, budget)
        procedures[f"floor, nf4, batches of {budget:,}"] = partial(floor, small, documents, budget)
        last = (sizes.layers - 1,)
        procedures[f"xtf, RI on the last layer, nf4, batches of {budget:,}"] = partial(
            xtf, small, documents, last, budget
        )
    times = in_turn(procedures, repeats, until)
    bases = [took for name, took in times.items() if "bf16" in name for _ in range(3)]
    for (name, took), base in zip(times.items(), bases, strict=True):
        yield ["nf4", name, f"{took * 1e3:.0f}", f"{took / base:.2f} x floor, bf16", "–"]


def without_triton(procedure: Callable[[], Any]) -> None:
    """Run a procedure with PyTorch instead of Triton."""
    with mock.patch.object(triton_dispatch, "usable", lambda tensor: False):
        procedure()


def pair(what: str, procedure: Callable[[], Any], repeats: int, until: float) -> Rows:
    """A kernel with Triton and with PyTorch alone."""
    found = in_turn({"Triton": procedure, "torch": partial(without_triton, procedure)}, repeats, until, warm_up=2)
    if not triton_dispatch.usable(torch.zeros(1, device=device(), dtype=BF16)):
        yield ["kernels", f"{what}, torch", f"{found['torch'] * 1e3:.2f}", "–", "no Triton here"]
        return
    if triton_dispatch._broken:
        raise RuntimeError(f"Triton's {', '.join(sorted(triton_dispatch._broken))} failed: torch ran in its place")
    ratio = found["Triton"] / found["torch"]
    yield ["kernels", f"{what}, torch", f"{found['torch'] * 1e3:.2f}", "–", "–"]
    yield ["kernels", f"{what}, Triton", f"{found['Triton'] * 1e3:.2f}", f"{ratio:.2f} x", reach.TRITON.judge(ratio)]


def attention(sizes: Sizes, repeats: int, until: float) -> Rows:
    """Attention received, of one layer."""
    for T in sizes.lengths:
        B, where = max(1, sizes.tokens // T), {"device": device(), "dtype": BF16}
        query = torch.randn(B, sizes.H, T, sizes.D, **where)
        key, value = (torch.randn(B, sizes.K, T, sizes.D, **where) for _ in range(2))
        lengths, spec = torch.full((B,), T, device=device()), AttentionSpec(sizes.D**-0.5)
        logsumexp = dispatch.attention_and_logsumexp(query, key, value, spec)[1]
        received = partial(dispatch.attention_received, query, key, lengths, spec, logsumexp=logsumexp)
        yield from pair(f"attention received, B {B}, T {T}", received, repeats, until)


def moments(sizes: Sizes, repeats: int, until: float) -> Rows:
    """Log-probability, entropy and deviation, with the head's product that both need."""
    head = nn.Linear(sizes.hidden, sizes.V, bias=False, device=device(), dtype=BF16).requires_grad_(False)
    hidden = torch.randn(sizes.N, sizes.hidden, device=device(), dtype=BF16)
    targets = torch.randint(sizes.V, (sizes.N,), device=device())
    predictions = partial(dispatch.predictions, hidden, head, targets)
    yield from pair(f"head and moments, N {sizes.N}, V {sizes.V}", predictions, repeats, until)
