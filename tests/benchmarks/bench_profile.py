"""The time of the floor and of the scoring pass by kind of operation.

    python -m tests.benchmarks.bench_profile [--device cuda] [--write docs/benchmarks]

On a CPU, the 30M model of bench_scoring; on a GPU, the model of bench_gpu. PyTorch's profiler measures single
operations. On a CPU, an operation is attributed to attention or to the head's sums by its caller, and otherwise by its
name; on a GPU, kernels are classified by name. The rest is Python, allocation, views, and on a GPU the time without a
kernel. The profiler takes time itself, so totals differ from those of other tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tests.benchmarks.bench_scoring import (
    ALL,
    DTYPES,
    FLOOR,
    LENGTHS,
    ONE,
    PROCEDURES,
    floor,
    make_documents,
    make_model,
    xtf,
)
from tests.benchmarks.common import NOT_MEASURED, arguments, publish, settled
from xtf_plugin.scoring.kernels import dispatch, logit_stats

PRODUCTS, ATTENTION, SUMS, ELEMENTWISE, COPIES, REST = (
    "matrix products",
    "attention",
    "softmax and log-sum-exp of the head",
    "norms, activations, elementwise",
    "copies",
    "rest",
)
KINDS = (PRODUCTS, ATTENTION, SUMS, ELEMENTWISE, COPIES, REST)
HEAD = ["model, dtype, lengths", "procedure", "all, ms", *(f"{kind}, ms" for kind in KINDS)]
SCOPES = {  # functions whose operations are of one kind, whatever their names
    ATTENTION: [(dispatch, "attention"), (dispatch, "attention_received"), (dispatch, "attention_and_received")],
    SUMS: [(logit_stats, "moments")],
}
# operations of PyTorch, without "aten::" and the underscore of those in place
NAMED = {
    PRODUCTS: "mm addmm bmm baddbmm matmul linear mv addmv mkldnn_linear _linear_pointwise",
    ATTENTION: "scaled_dot_product_attention",
    ELEMENTWISE: "add sub mul div neg pow exp exp2 log log2 sqrt rsqrt silu gelu sigmoid tanh sin cos mean sum amax "
    "max rms_norm _fused_rms_norm layer_norm native_layer_norm where masked_fill clamp clamp_min softmax _softmax",
    COPIES: "copy _to_copy to clone contiguous cat stack index index_select index_put _index_put_impl gather scatter "
    "embedding repeat_interleave repeat nonzero masked_select fill zero zeros full flip",
}
OPERATIONS = {f"aten::{name}": kind for kind, names in NAMED.items() for name in names.split()}
KERNELS = (  # the first that a kernel's name contains, in lower case
    (SUMS, r"_row_moments|softmax"),
    (ATTENTION, r"flash|fmha|attention|_received"),
    (PRODUCTS, r"gemm|gemv|cutlass|nvjet|cublas|splitk|wgmma"),
    (COPIES, r"memcpy|memset|copy|gather|scatter|index|embedding|cat|fill"),
    (ELEMENTWISE, r"elementwise|reduce|norm|silu|triton"),
)


def kind_of_kernel(name: str) -> str:
    """The kind of a GPU's kernel."""
    return next((kind for kind, pattern in KERNELS if re.search(pattern, name.lower())), REST)


def kind_of_operation(event: Any) -> str:
    """The kind of a CPU's operation: that of a surrounding scope or attention, otherwise its own."""
    around, own = event, OPERATIONS.get(event.name.rstrip("_"), REST)
    while around is not None:
        if around.name in SCOPES:
            return str(around.name)
        if OPERATIONS.get(around.name) == ATTENTION:
            return ATTENTION
        around = around.cpu_parent
    return own


@contextmanager
def scopes() -> Iterator[None]:
    """Within this context, a profile shows calls of the functions in SCOPES under the name of their kind."""

    def scoped(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*given: Any, **options: Any) -> Any:
            with record_function(kind):
                return function(*given, **options)

        return call

    with ExitStack() as stack:
        for kind, places in SCOPES.items():
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, scoped(kind, getattr(owner, name))))
        yield


def parts(procedure: Callable[[], Any], repeats: int, gpu: bool) -> tuple[float, dict[str, float]]:
    """Milliseconds of one run, and those of each kind of operation in it: means over some runs."""
    procedure()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with scopes(), profile(activities=activities) as profiled:
        begin = settled()
        for _ in range(repeats):
            procedure()
        whole = (settled() - begin) * 1e3 / repeats
    found = Counter[str]()
    for event in profiled.events():
        if not gpu and event.device_type == DeviceType.CPU:
            found[kind_of_operation(event)] += event.self_cpu_time_total
        elif gpu and event.device_type != DeviceType.CPU and not getattr(event, "is_user_annotation", False):
            found[kind_of_kernel(event.name)] += event.time_range.elapsed_us()
    if not found:
        raise RuntimeError("the profiler recorded nothing on this device")
    taken = {kind: found[kind] / 1e3 / repeats for kind in KINDS}
    taken[REST] = whole - sum(taken[kind] for kind in KINDS if kind != REST)
    return whole, taken


def row(case: str, procedure: str, whole: float, taken: dict[str, float]) -> list[str]:
    return [case, procedure, f"{whole:.0f}", *(f"{taken[kind]:.0f}" for kind in KINDS)]


def on_cpu(repeats: int, smoke: bool) -> list[list[str]]:
    """The model of bench_scoring, in every dtype and on documents of every length."""
    rows = []
    for dtype in DTYPES:
        for name, lengths in LENGTHS.items():
            model = make_model("tiny" if smoke else "30M", dtype)
            documents = make_documents((2, 20, 30) if smoke else lengths)
            for which in (FLOOR, ONE, ALL):
                case = f"{'tiny' if smoke else '30M'} {dtype} {name}"
                rows.append(row(case, which, *parts(partial(PROCEDURES[which], model, documents), repeats, False)))
    return rows


def on_gpu(repeats: int, rows: list[list[str]]) -> None:
    """The model of bench_gpu, on its documents; rows are added as they come."""
    from tests.benchmarks import gpu_parts

    sizes = gpu_parts.Sizes()
    model, layers = gpu_parts.large_model(sizes), tuple(range(sizes.layers))
    for name, lengths in sizes.documents.items():
        documents = make_documents(lengths, sizes.V)
        procedures = {
            FLOOR: partial(floor, model, documents, sizes.tokens),
            ONE: partial(xtf, model, documents, layers[-1:], sizes.tokens),
            ALL: partial(xtf, model, documents, layers, sizes.tokens),
        }
        for which, procedure in procedures.items():
            rows.append(row(f"bf16 {name}", which, *parts(procedure, repeats, True)))


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(given)
    mark = "profile" if options.device == "cpu" else "profile_gpu"
    rows: list[list[str]] = []
    try:
        if options.device == "cpu":
            rows += on_cpu(options.repeats, options.smoke)
        elif torch.cuda.is_available():
            on_gpu(options.repeats, rows)
        else:
            rows.append([f"{NOT_MEASURED}: no CUDA device", *["–"] * (len(HEAD) - 1)])
    finally:  # also when it is interrupted
        publish(mark, f"means of {options.repeats} runs under the profiler", HEAD, rows, options.write)


if __name__ == "__main__":
    main()
