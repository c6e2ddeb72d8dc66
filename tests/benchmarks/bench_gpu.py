"""Everything that only a GPU can tell about the cost of scoring, in one command of less than ten minutes.

    python -m tests.benchmarks.bench_gpu [--minutes 9] [--write docs/benchmarks.md]

Triton's kernels against their twins in torch, the scoring pass against the floor for a random Llama of about a billion
parameters in bfloat16, its peak memory, the same floor with 4-bit weights, and the published procedure. Each section
has a time limit; one that hits it, or fails, says so in its row and the next one begins. Without a GPU every row says
that nothing was measured; `--smoke` runs tiny sizes on whatever device there is.

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head or hidden size, V vocabulary, N picked tokens.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import bench_authors
from tests.benchmarks.bench_scoring import floor, make_documents, make_model, xtf
from tests.benchmarks.common import NOT_MEASURED, against, arguments, device, in_turn, publish
from xtf_plugin import kernels, triton_dispatch

BF16 = torch.bfloat16
HEAD = ["section", "what", "ms", "ratio", "reach"]
Rows = list[list[str]]


@dataclass(frozen=True)
class Sizes:
    """What is measured on; `SMOKE` shows that it runs, and nothing else."""

    lengths: tuple[int, ...] = (512, 2_048, 8_192)
    tokens: int = 16_384  # of a batch
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
    short: tuple[int, int, int] = (400, 50, 300)
    long: tuple[int, int, int] = (40, 1_000, 1_900)


SMOKE = Sizes((40,), 120, 4, 2, 16, 64, 128, 2, 512, 70, "tiny", (2, 20, 30), (4, 20, 40), (2, 60, 90))


def torch_alone() -> Any:
    """A patch under which Triton's twins are not used."""
    return mock.patch.object(triton_dispatch, "usable", lambda tensor: False)


def without_triton(procedure: Callable[[], Any]) -> None:
    with torch_alone():
        procedure()


def pair(section: str, what: str, procedure: Callable[[], Any], repeats: int, until: float) -> Rows:
    """A kernel as it comes and in torch alone."""
    found = in_turn({"Triton": procedure, "torch": partial(without_triton, procedure)}, repeats, until, warm_up=2)
    ratio = found["torch"] / found["Triton"]
    if not triton_dispatch.usable(torch.zeros(1, device=device(), dtype=BF16)):
        return [[section, f"{what}, torch", f"{found['torch'] * 1e3:.2f}", "–", "no Triton here"]]
    return [
        [section, f"{what}, torch", f"{found['torch'] * 1e3:.2f}", f"{ratio:.2f} x of Triton's", "–"],
        [section, f"{what}, Triton", f"{found['Triton'] * 1e3:.2f}", "1.00", against(ratio, 1, at_most=False)],
    ]


def attention_section(sizes: Sizes, repeats: int, until: float) -> Rows:
    """Attention received, of one layer."""
    rows: Rows = []
    for T in sizes.lengths:
        B, where = max(1, sizes.tokens // T), {"device": device(), "dtype": BF16}
        query = torch.randn(B, sizes.H, T, sizes.D, **where)
        key, value = (torch.randn(B, sizes.K, T, sizes.D, **where) for _ in range(2))
        lengths, scaling = torch.full((B,), T, device=device()), sizes.D**-0.5
        logsumexp = kernels.attention(query, key, value, scaling=scaling)[1]
        received = partial(kernels.attention_received, query, key, lengths, scaling=scaling, logsumexp=logsumexp)
        rows += pair("kernels", f"attention received, B {B}, T {T}", received, repeats, until)
    return rows


def moments_section(sizes: Sizes, repeats: int, until: float) -> Rows:
    """Log-probability, entropy and deviation, with the head's product that both need."""
    head = nn.Linear(sizes.hidden, sizes.V, bias=False, device=device(), dtype=BF16).requires_grad_(False)
    hidden = torch.randn(sizes.N, sizes.hidden, device=device(), dtype=BF16)
    targets = torch.randint(sizes.V, (sizes.N,), device=device())
    predictions = partial(kernels.predictions, hidden, head, targets)
    return pair("kernels", f"head and moments, N {sizes.N}, V {sizes.V}", predictions, repeats, until)


def large_model(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.V,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.H,
        num_key_value_heads=sizes.K,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    )
    with torch.device(device()):
        return LlamaForCausalLM(config).to(BF16).eval()


def peak(procedure: Callable[[], Any]) -> float:
    """MiB that a procedure allocates at its peak over what was there before; NaN without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    procedure()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def scoring_section(sizes: Sizes, repeats: int, until: float) -> Rows:
    """The pass over the floor, and both their peaks."""
    model, rows = large_model(sizes), []
    for name, lengths in (("short", sizes.short), ("long", sizes.long)):
        documents, budget = make_documents(lengths, sizes.V), sizes.tokens
        layers = tuple(range(sizes.layers))
        procedures = {
            "floor": partial(floor, model, documents, budget),
            "xtf, RI on the last layer": partial(xtf, model, documents, layers[-1:], budget),
            "xtf, RI on all layers": partial(xtf, model, documents, layers, budget),
        }
        times = in_turn(procedures, repeats, until)
        peaks = {what: peak(procedure) for what, procedure in procedures.items()}
        for (what, took), reach in zip(times.items(), (None, 1.25, 1.40), strict=True):
            ratio = took / times["floor"]
            goal, cell = "–" if reach is None else against(ratio, reach), f"{ratio:.2f} x floor"
            if torch.cuda.is_available():
                memory = peaks[what] / peaks["floor"]
                cell += f", {peaks[what]:,.0f} MiB, {memory:.2f} x"
                goal += "" if reach is None else f"; memory {against(memory, 1.1)}"
            rows.append([f"scoring, {name}", what, f"{took * 1e3:.0f}", cell, goal])
    return rows


def quantise(model: LlamaForCausalLM) -> None:
    """Put 4-bit layers in the place of the decoder's, as loading with `load_in_4bit` does."""
    for module in list(model.model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                small = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=BF16
                )
                small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, small.to(device()))


def quantised_section(sizes: Sizes, repeats: int, until: float) -> Rows:
    """The floor, and the pass, with weights in 4 bits."""
    plain, small, documents = large_model(sizes), large_model(sizes), make_documents(sizes.short, sizes.V)
    quantise(small)
    procedures = {
        "floor, bf16": partial(floor, plain, documents, sizes.tokens),
        "floor, nf4": partial(floor, small, documents, sizes.tokens),
        "xtf, RI on the last layer, nf4": partial(xtf, small, documents, (sizes.layers - 1,), sizes.tokens),
    }
    times = in_turn(procedures, repeats, until)
    base = times["floor, bf16"]
    return [["nf4", what, f"{took * 1e3:.0f}", f"{took / base:.2f} x floor, bf16", "–"] for what, took in times.items()]


def authors_section(sizes: Sizes, repeats: int, until: float) -> Rows:
    """The published procedure, restated."""
    del until
    model = make_model(sizes.authors, "bf16").to(device())
    documents = make_documents(sizes.authors_documents)
    found = bench_authors.measure(model, documents, min(repeats, 3))
    cells = bench_authors.rows_of("authors", found, 200)
    return [[case, what, ms, f"{ours} x ours, {floor} x floor", goal] for case, what, ms, ours, floor, goal in cells]


SECTIONS: dict[str, tuple[Callable[[Sizes, int, float], Rows], float]] = {  # and each one's part of the time
    "scoring": (scoring_section, 0.3),
    "attention received": (attention_section, 0.15),
    "head and moments": (moments_section, 0.1),
    "nf4": (quantised_section, 0.2),
    "authors": (authors_section, 0.25),
}


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the body when its time is over."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(sizes: Sizes, repeats: int, total: float) -> Rows:
    """All sections, each within its part of the time."""
    rows: Rows = []
    for name, (section, part) in SECTIONS.items():
        seconds = total * part
        try:
            with limit(seconds):
                rows += section(sizes, repeats, time.perf_counter() + 0.6 * seconds)
        except (TimeoutError, RuntimeError) as error:  # RuntimeError: also out of memory
            rows.append([name, f"failed: {str(error).splitlines()[0][:100]}", "–", "–", "–"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=9)
    options = parser.parse_args(given)
    sizes = SMOKE if options.smoke else Sizes()
    if torch.cuda.is_available() or options.smoke:
        rows = measure(sizes, options.repeats, 60 * options.minutes)
    else:
        rows = [[name, f"{NOT_MEASURED}: no CUDA device", "–", "–", "–"] for name in SECTIONS]
    caption = (
        f"bf16, {sizes.layers} layers of {sizes.hidden}, vocabulary {sizes.V:,}, batches of {sizes.tokens:,} tokens"
    )
    publish("bench_gpu", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
