"""Whether `torch.compile` would pay for a scoring pass: what compiling takes, what it saves, and when that is even.

    python -m tests.benchmarks.bench_compile [--dtype bf16] [--device cuda]

The decoder of the 30M model of bench_scoring on its short documents, in batches of different shapes, as scoring has
them. The pass itself does not compile anything: a user would need a C++ compiler, and most runs score less than the
break-even.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tests.benchmarks.bench_scoring import DTYPES, batches, machine, make_documents, make_model


@torch.no_grad()
def seconds(decoder, documents, device: str, repeats: int) -> tuple[float, float]:
    """The first pass over the batches, and the median of those after it."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for ids, _ in batches(documents):
            decoder(input_ids=ids.to(device), use_cache=False)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times[0], statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, documents = make_model("30M", options.dtype).to(options.device), make_documents("short")
    _, eager = seconds(model.model, documents, options.device, options.repeats)
    compiled = torch.compile(model.model, dynamic=True)
    first, steady = seconds(compiled, documents, options.device, options.repeats)
    tokens, saved = int(documents.lengths.sum()), eager - steady
    even = f"{(first - steady) / saved * tokens:,.0f} tokens" if saved > 0 else "never"
    print(f"{machine()}; {options.dtype}, {options.device}\n")
    print("| decoder | first pass, s | pass, s | of eager | even after |\n|---|---:|---:|---:|---:|")
    print(f"| eager | {eager:.2f} | {eager:.2f} | 1.00 | |")
    print(f"| compiled, dynamic shapes | {first:.1f} | {steady:.2f} | {steady / eager:.2f} | {even} |")


if __name__ == "__main__":
    main()
