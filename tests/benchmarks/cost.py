"""Time and memory of the scoring pass by arithmetic: the tables of docs/cost.md. Nothing is run or measured.

    python -m tests.benchmarks.cost [--flops 4e14] [--tokens 1e6] [--length 1024] [--write docs/cost.md]

`--flops` is what a device achieves on large products, not what its maker states; the default is about 40 % of what an
H100 is stated to do in bfloat16. A multiplication and the addition behind it are two operations.

Dimensions: T tokens of a document, D hidden size, V vocabulary, L layers, S scored layers, P weights of the layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.tables import table, write_into
from xtf_plugin.scoring.batching import MAX_BATCH_TOKENS
from xtf_plugin.scoring.kernels.dispatch import TRITON_LOGIT_ELEMENTS

GIB = 2**30
NF4_BYTES = 0.5 + 4 / 64  # 4 bits, and a float for each 64 weights: scales are not quantised in turn
BATCH_TOKENS = MAX_BATCH_TOKENS  # what `batch_tokens: auto` goes up to on a GPU


@dataclass(frozen=True)
class Shape:
    """What the cost of a Llama-like model depends on."""

    name: str
    D: int
    L: int
    V: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def P(self) -> int:
        """Weights in the layers' products: attention, grouped keys and values, and three matrices of the MLP."""
        attention = self.D * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.L * (attention + 3 * self.D * self.intermediate)

    @property
    def embeddings(self) -> int:
        """Weights of input embedding and head, which quantisation leaves alone."""
        return self.V * self.D * (1 if self.tied else 2)

    def forward_flops(self, T: float) -> float:
        """Operations a token of the decoder: 2 P, and attention over the T / 2 tokens that it sees on average."""
        return 2 * self.P + self.L * self.seen(T) * 2

    def seen(self, T: float) -> float:
        """Operations a token of one product of attention (scores, or weights times values), causal."""
        return 2 * self.heads * self.head_dim * T / 2

    def head_flops(self) -> float:
        """Operations of the head on one token."""
        return 2 * self.D * self.V

    def received_flops(self, T: float, S: int) -> float:
        """Operations a token of attention received: the scores once more, on S layers."""
        return S * self.seen(T)


SHAPES = (
    Shape("1B (Llama-3.2-1B)", 2_048, 16, 128_256, 8_192, 32, 8, 64, True),
    Shape("8B (Llama-3.1-8B)", 4_096, 32, 128_256, 14_336, 32, 8, 128, False),
    Shape("70B (Llama-3.1-70B)", 8_192, 80, 128_256, 28_672, 64, 8, 128, False),
)


def time_rows(tokens: float, completion: float, T: float, flops: float) -> list[list[str]]:
    """Minutes of the pass, and what its parts are of the floor."""
    rows = []
    for shape in SHAPES:
        decoder, head = shape.forward_flops(T), completion * shape.head_flops()
        floor = decoder + head
        one, every = (shape.received_flops(T, S) for S in (1, shape.L))
        whole = (floor + one) * tokens / flops / 60
        authors = 2 * (decoder + shape.head_flops()) / floor
        shares = [f"{part / floor:.1%}" for part in (head, one, every)]
        rows.append([shape.name, f"{floor / 1e9:.1f}", *shares, f"{whole:.1f}", f"{authors:.1f}"])
    return rows


def memory_rows(T: float) -> list[list[str]]:
    """GiB of weights, of what a batch holds, and of what never exists."""
    rows = []
    for shape in SHAPES:
        weights = 2 * (shape.P + shape.embeddings), NF4_BYTES * shape.P + 2 * shape.embeddings
        hidden = 2 * BATCH_TOKENS * shape.D
        layer = 2 * BATCH_TOKENS * (2 * shape.intermediate + 2 * shape.D)
        copies = 2 * 2 * BATCH_TOKENS * shape.heads * shape.head_dim  # keys and values, for all heads
        chunk = 2 * max(64 * shape.V, TRITON_LOGIT_ELEMENTS)
        never = 4 * BATCH_TOKENS * shape.V, 2 * shape.L * shape.heads * T * BATCH_TOKENS
        rows.append([shape.name, *(f"{size / GIB:.2f}" for size in (*weights, hidden, layer, copies, chunk, *never))])
    return rows


def received_rows() -> list[list[str]]:
    """What recording one layer, and all of them, adds to the floor, by document length; half of it completion."""
    rows = []
    for shape in SHAPES:
        for S in (1, shape.L):
            shares = []
            for T in (512, 2_048, 8_192):
                floor = shape.forward_flops(T) + shape.head_flops() / 2
                shares.append(f"{shape.received_flops(T, S) / floor:.2%}")
            rows.append([f"{shape.name}, {'one layer' if S == 1 else 'all layers'}", *shares])
    return rows


def everything(tokens: float, completion: float, T: float, flops: float) -> str:
    """All tables, as Markdown."""
    minutes = f"minutes for {tokens / 1e6:g} M tokens"
    time = ["model", "GFLOP a token, floor", "of it the head", "+ RI, one layer", "+ RI, all layers", minutes]
    time.append("two passes, x floor")
    memory = ["model", "weights bf16", "weights nf4", "hidden states", "inside a layer"]
    memory += ["keys and values of all heads, if padded", "logits chunk", "never: all logits, fp32", "never: all maps"]
    stated = f"computed, not measured: {T:,.0f} tokens a document, {completion:.0%} of them completion"
    return "\n".join(
        [
            f"Time, {stated}, {flops / 1e12:,.0f} TFLOP/s achieved.\n",
            table(time, time_rows(tokens, completion, T, flops)),
            f"Memory in GiB, {stated}, batches of {BATCH_TOKENS:,} tokens, the most.\n",
            table(memory, memory_rows(T)),
            "Attention received beside the floor by document length, computed, not measured; half of it completion.\n",
            table(["recorded", "T = 512", "T = 2,048", "T = 8,192"], received_rows()),
        ]
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=4e14, help="operations a second that the device achieves")
    parser.add_argument("--tokens", type=float, default=1e7, help="of the data set")
    parser.add_argument("--completion", type=float, default=0.5, help="share of the tokens")
    parser.add_argument("--length", type=float, default=1_024, help="tokens of a document")
    parser.add_argument("--write", type=Path, help="also put the tables into this page, between the marks `cost`")
    options = parser.parse_args(given)
    text = everything(options.tokens, options.completion, options.length, options.flops)
    print(text)
    if options.write is not None:
        write_into(options.write, text, "<!-- cost -->", "<!-- /cost -->")


if __name__ == "__main__":
    main()
