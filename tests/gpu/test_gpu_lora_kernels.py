"""Scoring in a model with Axolotl's fused LoRA kernels on a GPU, where nothing of them is replaced.

The checks are those of tests/axolotl/test_lora_kernels.py. On a GPU machine without a network, Axolotl's wheel and what
it imports can lie in a folder on PYTHONPATH.
"""

from __future__ import annotations

import pytest
import torch

try:
    from tests import lora_kernels
except ModuleNotFoundError as error:
    # tests/axolotl is found by that name too, where the folder of tests is on the path
    if str(error.name).partition(".")[0] not in ("axolotl", "bitsandbytes"):  # what they need is missing
        raise
    lora_kernels = None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(lora_kernels is None, reason="needs Axolotl and bitsandbytes"),
]
FAMILIES = lora_kernels.FAMILIES if lora_kernels else ("none",)
PRECISIONS = lora_kernels.PRECISIONS if lora_kernels else {"bfloat16 nf4": ()}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def setting(request):
    family, precision = request.param
    return lora_kernels.Setting(family, *PRECISIONS[precision], device="cuda")


ALL = pytest.mark.parametrize(
    "setting", [(family, precision) for family in FAMILIES for precision in PRECISIONS], ids="-".join, indirect=True
)


@ALL
def test_scores_are_those_of_the_base_model(parent, setting):
    lora_kernels.check_scores(setting, parent)


@ALL
def test_kernels_leave_out_adapters_that_are_off(parent, setting):
    lora_kernels.check_adapters_off(setting, parent)


@pytest.mark.parametrize("setting", [(family, "bfloat16 nf4") for family in FAMILIES], ids="-".join, indirect=True)
def test_a_separate_reference_in_the_same_process(parent, setting):
    lora_kernels.check_separate(setting, parent)
