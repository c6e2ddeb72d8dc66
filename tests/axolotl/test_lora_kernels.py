"""Scoring a model with Axolotl's fused LoRA kernels on a CPU: only their CUDA calls are replaced.

tests/gpu/test_gpu_lora_kernels.py does the same with the CUDA calls.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import bitsandbytes
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from axolotl.kernels import quantize
from transformers import AutoModelForCausalLM

from tests import lora_kernels
from tests.axolotl import stock, without_cuda
from tests.lora_kernels import FAMILIES, PRECISIONS, Setting

pytestmark = pytest.mark.xdist_group("lora kernels")
INJECTED = """
import atexit, json, os, runpy
runpy.run_path(os.environ["RECORDER"])
from xtf_plugin.hosts.boot import when_imported

def replaced(lora):
    from tests.axolotl import without_cuda
    without_cuda.replace_cuda_calls()

def watch(patches):
    from tests import lora_kernels
    watched = lora_kernels.watched()
    calls = watched.__enter__()

    def save():
        watched  # keeps it open
        found = {str(wanted): [sorted(calls.names(wanted)), sorted(calls.given(wanted))] for wanted in (False, True)}
        with open(os.environ["CALLS"], "w") as file:
            json.dump(found, file)

    atexit.register(save)

when_imported("axolotl.kernels.lora", replaced)
when_imported("axolotl.monkeypatch.lora_kernels", watch)
"""


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    without_cuda.replace_cuda_calls(monkeypatch.setattr)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_base_model(parent, family, precision):
    lora_kernels.check_scores(Setting(family, *PRECISIONS[precision]), parent)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_ignore_adapters_that_are_off(parent, family, precision):
    lora_kernels.check_adapters_off(Setting(family, *PRECISIONS[precision]), parent)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_separate_reference_in_the_same_process(parent, family):
    lora_kernels.check_separate(Setting(family, torch.float32, True), parent)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder with trained adapters: new ones are zero, and would not change the scores if they were on."""
    folder = tmp_path_factory.mktemp("adapter")
    lora_kernels.adapted(AutoModelForCausalLM.from_pretrained(base / "model")).save_pretrained(folder)
    return folder


def test_a_stock_run_scores_the_same_with_kernels(base, adapter, tmp_path):
    """`axolotl train` continues to train adapters in 4-bit QLoRA, with all four kernels and without."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(INJECTED)
    injected = {
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[2])]),
        "RECORDER": str(stock.RECORDER / "sitecustomize.py"),
        "CALLS": str(tmp_path / "calls.json"),
    }
    recipe = {
        "lora_target_modules": lora_kernels.TARGETS,
        "lora_model_dir": str(adapter),
        "lora_r": 8,
        "lora_alpha": 16,
        "save_strategy": "epoch",
    }
    with_, without = tmp_path / "with" / "out", tmp_path / "without" / "out"
    stock.train(stock.write(base, without, **recipe), without, tmp_path / "cache")
    path = stock.write(base, with_, **recipe, **lora_kernels.FLAGS)
    stock.train(path, with_, tmp_path / "another cache", **injected)
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls["False"] == [sorted(lora_kernels.ATTENTION), [False]], "scoring"
    assert calls["True"] == [sorted(lora_kernels.FUNCTIONS), [True]], "training"
    found, expected = (pq.read_table(out / "xtf/scores.parquet") for out in (with_, without))
    assert found.column_names == expected.column_names and found.num_rows == expected.num_rows > 500
    for name in expected.column_names:
        one, two = (table[name].to_numpy(zero_copy_only=False) for table in (found, expected))
        if np.issubdtype(two.dtype, np.floating):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, two)
    assert stock.seen(with_) == stock.seen(without)
    np.testing.assert_allclose(stock.losses(with_), stock.losses(without), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_dequantises_nf4_as_bitsandbytes_does(dtype):
    torch.manual_seed(0)
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(70, 64).to(dtype), quant_type="nf4", compress_statistics=True
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(quantize.dequantize(packed, state), expected)
    torch.testing.assert_close(quantize.dequantize(packed.t(), state), expected.t())
