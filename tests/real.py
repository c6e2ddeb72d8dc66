"""Real pretrained models for tests and benchmarks, text for them, and their scores in full precision.

`make models` creates their folders (recipes/models.py). Tests of a missing model are skipped with that reason.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests import eager
from xtf_plugin.data.documents import DocumentSet, collect
from xtf_plugin.scoring.engine import score
from xtf_plugin.scoring.reference import Reference
from xtf_plugin.store.records import Lookup

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("XTF_TEST_MODELS") or ROOT / ".models")
SMOLLM2, GEMMA3, QWEN = "SmolLM2-135M-Instruct", "gemma-3-270m", "Qwen2.5-Coder-0.5B-Instruct"
NAMES = (SMOLLM2, GEMMA3, QWEN)
PAIRS = ROOT / "recipes/demo/clean.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}


def is_made(name: str) -> bool:
    """Whether the model folder is there."""
    return (MODELS / name / "model.safetensors").is_file()


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test if the model is missing."""
    return pytest.mark.skipif(not is_made(name), reason=f"needs {MODELS / name}: make models")


def tokenizer(name: str) -> Any:
    """The tokenizer of a model."""
    return AutoTokenizer.from_pretrained(MODELS / name)


def load(name: str, precision: str, device: torch.device | str = "cpu", compute: torch.dtype | None = None) -> Any:
    """A model in fp32, bf16, or with 4-bit weights (nf4).

    Args:
        compute: dtype of everything outside 4 bits; None: that of the precision, bfloat16 for nf4.
    """
    dtype = compute or DTYPES[precision]
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(MODELS / name, **options).eval()


def rows(fast: Any, count: int) -> list[dict[str, list[int]]]:
    """The demo's question and answer pairs as TRL prepares them: token ids, and labels on the answer alone."""
    with PAIRS.open(encoding="utf-8") as handle:
        pairs = [json.loads(line) for _, line in zip(range(count), handle, strict=False)]
    return [row_of(fast, pair["prompt"], pair["completion"]) for pair in pairs]


def row_of(fast: Any, question: str, answer: str) -> dict[str, list[int]]:
    """One prepared row; through the chat template, if the tokenizer has one."""
    if fast.chat_template:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = fast.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = fast.apply_chat_template(messages, return_dict=True)["input_ids"]
    else:
        prompt = fast(f"{question}\n")["input_ids"]
        ids = fast(f"{question}\n{answer}")["input_ids"] + [fast.eos_token_id]
    assert ids[: len(prompt)] == prompt, "the answer changes how the question is tokenised"
    return {"input_ids": list(ids), "labels": [-100] * len(prompt) + list(ids[len(prompt) :])}


def documents(name: str, count: int) -> DocumentSet:
    """Documents of the demo's pairs under the tokenizer of a model."""
    return collect(rows(tokenizer(name), count))


@dataclass(frozen=True)
class Scores:
    """Scores of all completion tokens, in the order of the documents; float32, NaN where undefined."""

    logprobs: torch.Tensor
    received: torch.Tensor


def ours(model: Any, of: DocumentSet, layers: tuple[int, ...]) -> Scores:
    """Scores of the package's scoring pass."""
    found = Lookup(of.keys, np.diff(of.completion_offsets), attention=True)
    score(of, np.arange(len(of)), Reference(model, "a real model"), layers, found.take, progress=False)
    return Scores(*(torch.from_numpy(found.columns[name]) for name in ("logprobs", "attention")))


def definition(model: Any, of: DocumentSet, layers: tuple[int, ...]) -> Scores:
    """The same by the definitions, from transformers' eager attention maps and full logits, one document at a time."""
    parts = []
    for index in range(len(of)):
        ids, completion = of.document(index)
        parts.append([x[torch.from_numpy(completion)] for x in eager.scores(model, ids.astype(np.int64), layers)])
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def errors(truth: Scores, found: Scores) -> dict[str, torch.Tensor]:
    """Absolute differences by score; both must be undefined in the same places."""
    pairs = {"logprobs": (truth.logprobs, found.logprobs), "received": (truth.received, found.received)}
    for name, (one, two) in pairs.items():
        assert torch.equal(one.isnan(), two.isnan()), f"{name} is undefined in other places"
    return {name: (one - two).abs()[~one.isnan()] for name, (one, two) in pairs.items()}


def spread(error: torch.Tensor) -> tuple[float, float, float]:
    """Mean, 99th percentile and largest value of some errors."""
    return float(error.mean()), float(error.quantile(0.99)), float(error.max())


def verdict(found: torch.Tensor, naive: torch.Tensor, exact: float) -> str:
    """Whether the errors of the scoring pass satisfy |found - truth| <= |naive - truth| + tolerance, on average.

    Both are independent rounding errors of the same size, so single tokens are not compared. The tolerance is `exact`
    plus three standard errors of the mean difference.
    """
    difference = found - naive
    allowed = exact + 3 * float(difference.std()) / len(difference) ** 0.5
    return (
        "kept" if float(difference.mean()) <= allowed else f"missed: worse by {float(difference.mean()):.1e} on average"
    )
