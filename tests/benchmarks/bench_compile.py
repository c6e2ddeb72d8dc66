"""`torch.compile` for a scoring pass: the time to compile, the time saved, and the tokens at which they are equal.

    python -m tests.benchmarks.bench_compile [--dtype bf16] [--write docs/benchmarks]

The decoder of the 30M model of bench_scoring on its short documents, in batches of different shapes, as scoring has
them. The pass itself does not compile anything: a user would need a C++ compiler.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from tests.benchmarks.bench_scoring import DTYPES, batches, make_documents, make_model
from tests.benchmarks.common import arguments, device, publish, settled

HEAD = ["decoder", "first pass, s", "pass, s", "of eager", "even after"]


@torch.no_grad()
def seconds(decoder, documents, where: torch.device, repeats: int) -> tuple[float, float]:
    """The first pass over the batches, and the median of those after it."""
    times = []
    for _ in range(repeats + 1):
        begin = settled()
        for ids, _ in batches(documents):
            decoder(input_ids=ids.to(where), use_cache=False)
        times.append(settled() - begin)
    return times[0], statistics.median(times[1:])


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args(given)
    where = device()
    size, lengths, backend = ("tiny", (2, 20, 30), "eager") if options.smoke else ("30M", "short", "inductor")
    model, documents = make_model(size, options.dtype).to(where), make_documents(lengths)
    _, eager = seconds(model.model, documents, where, options.repeats)
    compiled = torch.compile(model.model, dynamic=True, backend=backend)
    first, steady = seconds(compiled, documents, where, options.repeats)
    tokens, saved = int(documents.lengths.sum()), eager - steady
    even = f"{(first - steady) / saved * tokens:,.0f} tokens" if saved > 0 else "never"
    rows = [
        ["eager", "", f"{eager:.2f}", "1.00", ""],
        ["compiled, dynamic shapes", f"{first:.1f}", f"{steady:.2f}", f"{steady / eager:.2f}", even],
    ]
    caption = f"{size} model, {options.dtype}, short documents, medians of {options.repeats}"
    publish("compile", caption, HEAD, rows, options.write)


if __name__ == "__main__":
    main()
