"""Models with Axolotl's fused LoRA kernels, and checks of their scores. Needs Axolotl.

The checks are the same on every device; tests on a CPU replace the CUDA calls of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import numpy as np
import torch
from axolotl.kernels import lora
from axolotl.monkeypatch import lora_kernels as patches
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tests.scoring.test_engine import rows
from tests.scoring.test_kernels import error
from xtf_plugin.data.documents import collect
from xtf_plugin.scoring import engine
from xtf_plugin.scoring.reference import Reference, borrow
from xtf_plugin.store.records import Lookup

FLAGS = {f"lora_{name}_kernel": True for name in ("qkv", "o", "mlp", "embedding")}
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")] + ["embed_tokens"]
FUNCTIONS = ("LoRA_QKV", "LoRA_O", "LoRA_MLP", "LoRA_Embedding")
ATTENTION = {"LoRA_QKV", "LoRA_O"}  # the kernels that scoring uses
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")
PRECISIONS = {  # dtype of the computation, and whether the base is in 4 bits; the most common first
    "bfloat16 nf4": (torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, False),
    "nf4": (torch.float32, True),
    "float32": (torch.float32, False),
}
SCALED = ("gemma2", "gemma3")  # whose embeddings have a factor, and whose GELU is an approximation

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, how its base is stored, and where it runs.

    Args:
        family: one of `tiny.FAMILIES`.
        dtype: of the computation, and of weights that are not in 4 bits.
        nf4: whether the linear layers are stored as QLoRA stores them, scales quantised too.
    """

    family: str
    dtype: torch.dtype
    nf4: bool
    device: str = "cpu"

    def folder(self, parent: Path) -> Path:
        """The folder of the base model, written if missing."""
        folder = parent / self.family
        if not folder.exists():
            tiny.model(self.family).save_pretrained(folder)
        return folder

    def base(self, folder: Path) -> Any:
        """The base model of a folder, without adapters."""
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
            bnb_4bit_quant_storage=torch.bfloat16,  # as Axolotl sets it
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, quantization_config=bits if self.nf4 else None, device_map={"": self.device}
        )


def exact(base: Any, folder: Path, device: str) -> Any:
    """The same weights in float32, without quantisation: the truth for a base model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device})
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name]
            state = getattr(weight, "quant_state", None)
            parameter.copy_(weight if state is None else bitsandbytes.functional.dequantize_4bit(weight.data, state))
    return model


def adapted(base: Any) -> PeftModel:
    """Adapters on every linear layer and the embeddings, so large that scores change much while they are on."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # what PEFT starts at zero
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


@contextmanager
def attention_patched(folder: Path) -> Iterator[DictDefault]:
    """Axolotl's patch of the attention class, undone on exit."""
    recipe = DictDefault({"base_model": str(folder), **FLAGS})
    attention = patches.get_attention_cls_from_config(recipe)
    forward = attention.forward
    patches.patch_self_attn_lora(recipe)
    assert attention.forward is not forward
    try:
        yield recipe
    finally:
        attention.forward = forward
        del attention._original_forward


@dataclass
class Calls:
    """Which kernels ran, and whether they were given adapter weights; each with whether gradients were enabled."""

    ran: list[tuple[str, bool]] = field(default_factory=list)
    asked: list[tuple[bool, bool]] = field(default_factory=list)

    def names(self, gradients: bool) -> set[str]:
        return {name for name, wanted in self.ran if wanted is gradients}

    def given(self, gradients: bool) -> set[bool]:
        return {given for given, wanted in self.asked if wanted is gradients}


@contextmanager
def watched() -> Iterator[Calls]:
    """The kernels that run within this."""
    calls, before = Calls(), dict(vars(lora))

    def kernel(name: str) -> SimpleNamespace:
        def apply(*args: Any) -> Any:
            calls.ran.append((name, torch.is_grad_enabled()))
            return before[name].apply(*args)

        return SimpleNamespace(apply=apply)

    def parameters(name: str, at: int) -> Any:
        def get(module: Any) -> Any:
            found = before[name](module)
            calls.asked.append((found[at] is not None, torch.is_grad_enabled()))
            return found

        return get

    replaced = {name: kernel(name) for name in FUNCTIONS}
    replaced["get_lora_parameters"] = parameters("get_lora_parameters", 3)
    replaced["get_embedding_lora_parameters"] = parameters("get_embedding_lora_parameters", 1)
    vars(lora).update(replaced)
    try:
        yield calls
    finally:
        vars(lora).update({name: before[name] for name in replaced})


DOCUMENTS = collect(rows())
IDS = torch.from_numpy(DOCUMENTS.document(0)[0].astype(np.int64))


def scores(reference: Reference) -> Scores:
    """Everything that XTF computes with a reference: scores of completion tokens, and context-free embeddings."""
    found = Lookup(DOCUMENTS.keys, np.diff(DOCUMENTS.completion_offsets), attention=True)
    engine.score(DOCUMENTS, np.arange(len(DOCUMENTS)), reference, (0, 1), found.take, batch_tokens=150, progress=False)
    made = {name: torch.as_tensor(values) for name, values in found.columns.items()}
    for kind in ("input", "output"):
        made[kind] = engine.gather_vectors(reference, np.arange(4, 60), kind)
    assert {"logprobs", "attention", "entropy", "deviation", "input", "output"} == made.keys()
    return made


@torch.no_grad()
def own(model: Any) -> Tensor:
    """Log-probabilities of one document's tokens by the forward that the model is trained with, on the CPU."""
    model.train()  # else bitsandbytes repacks 4-bit weights on some CPUs, into what these kernels cannot read
    ids = IDS.to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].cpu()


def step(model: Any) -> dict[str, Tensor]:
    """Loss and gradients of one training step, by computations that give the same bits every time."""
    model.train()
    model.zero_grad(set_to_none=True)
    ids = IDS.to(model.device)[None]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) > 20 and all(bool(grad.any()) for grad in grads.values()), "an adapter learns nothing"
    return {"loss": loss.detach(), **grads}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two steps gave the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def gap(one: Tensor, two: Tensor) -> float:
    """Mean absolute difference, in nats where these are log-probabilities."""
    return float((one - two).abs().nanmean())


def check_rounding(truth: Tensor, found: Tensor, naive: Tensor) -> None:
    """The error of the scores is no larger than that of the base model in the same precision.

    Slightly larger is allowed, since sums in another order round differently.
    """
    ours, theirs = error(truth, found), error(truth, naive)
    assert ours.mean() <= 1.2 * theirs.mean() + 2e-5
    assert ours.max() <= 1.5 * theirs.max() + 1e-4


def check_scores(setting: Setting, parent: Path) -> None:
    """Scores through the kernels are those of the base model, and the next training step is what it was.

    Raises:
        AssertionError: they are not, or this setting cannot show it.
    """
    folder = setting.folder(parent)
    base = setting.base(folder)
    truth, naive = scores(Reference(exact(base, folder, setting.device), "exact")), scores(Reference(base, "base"))
    model = adapted(base)
    with attention_patched(folder) as recipe:
        patches.apply_lora_kernel_patches(model, recipe)
        with watched() as trained:
            before = step(model)
        assert trained.names(True) == set(FUNCTIONS) and trained.given(True) == {True}, "training ran without kernels"
        assert same(step(model), before), "this step does not repeat on this device"
        with watched() as called:
            found = scores(borrow(model))
        assert not called.names(True), "scoring ran with gradients"
        assert called.names(False) == ATTENTION, "scoring uses kernels that are not known to be right"
        assert called.given(False) == {False}, "a kernel was given the weights of an adapter"
        for name, values in truth.items():
            check_rounding(values, found[name], naive[name])
        adapters_on = scores(Reference(model.get_base_model(), "adapters on"))
        for name in ("logprobs", "input", "output"):
            assert gap(adapters_on[name], found[name]) > 0.2, f"{name} does not depend on the adapters"
        assert same(step(model), before), "scoring changed the next training step"


def check_adapters_off(setting: Setting, parent: Path) -> None:
    """All four kernels ignore adapters that PEFT has turned off.

    They then compute the base model, except for Gemma, for which scoring bypasses two of them.
    """
    folder = setting.folder(parent)
    base = setting.base(folder)
    truth, naive = own(exact(base, folder, setting.device)), own(base)
    model = adapted(base)
    with attention_patched(folder) as recipe:
        patches.apply_lora_kernel_patches(model, recipe)
        on = own(model)
        with watched() as called, model.disable_adapter():
            off = own(model)
    assert called.names(False) == set(FUNCTIONS) and called.given(False) == {False}
    assert gap(on, naive) > 0.2
    if setting.family in SCALED:
        assert gap(off, naive) > 0.1, "these kernels are right for Gemma now: scoring need not bypass them"
    else:
        check_rounding(truth, off, naive)


def check_separate(setting: Setting, parent: Path) -> None:
    """A model without kernels (a separate reference) in a process whose attention class is patched."""
    folder = setting.folder(parent)
    base = setting.base(folder)
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    truth, naive = scores(Reference(exact(base, folder, setting.device), "exact")), scores(Reference(base, "base"))
    with attention_patched(folder):
        found = scores(Reference(base, "separate"))
    for name, values in truth.items():
        check_rounding(values, found[name], naive[name])
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
