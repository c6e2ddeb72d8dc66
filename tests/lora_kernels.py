"""Models as Axolotl trains them through its fused LoRA kernels, what XTF's scores of them must be, and how to tell.

The same on every device: the test on a CPU replaces the CUDA calls, the one on a GPU nothing. Needs Axolotl.
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

FLAGS = {f"lora_{name}_kernel": True for name in ("qkv", "o", "mlp", "embedding")}
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")] + ["embed_tokens"]
FUNCTIONS = ("LoRA_QKV", "LoRA_O", "LoRA_MLP", "LoRA_Embedding")
ATTENTION = {"LoRA_QKV", "LoRA_O"}  # the kernels that scoring runs through
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")
PRECISIONS = {  # dtype of the computation, and whether the base is in 4 bits; the most used one first
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
        """Where the base model is; written when it is not there."""
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
    """The same weights in float32, nothing quantised: what a base model is held against."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device})
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name]
            state = getattr(weight, "quant_state", None)
            parameter.copy_(weight if state is None else bitsandbytes.functional.dequantize_4bit(weight.data, state))
    return model


def adapted(base: Any) -> PeftModel:
    """Adapters on every linear layer and the embeddings, as large as the weights: left on, they change everything."""
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
    """Axolotl's patch of the attention class, which it never takes back; here it is taken back."""
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
    """Which kernels ran, and whether they were given the weights of adapters; each time, if gradients were wanted."""

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
    """All that XTF takes from a reference: scores of every completion token, and context-free embeddings."""
    found: dict[bytes, dict[str, Any]] = {}

    def sink(records: Any) -> None:
        for index, key in enumerate(records.keys):
            found[key.tobytes()] = records.part(index, index + 1).columns

    engine.score(DOCUMENTS, np.arange(len(DOCUMENTS)), reference, (0, 1), sink, batch_tokens=150, progress=False)
    in_order = [found[key.tobytes()] for key in DOCUMENTS.keys]
    made = {name: torch.cat([torch.as_tensor(part[name]) for part in in_order]) for name in in_order[0]}
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
    """What is found is no further from the truth than what the base model gives in the same precision.

    A little further may be luck: products that add up in another order round otherwise.
    """
    ours, theirs = error(truth, found), error(truth, naive)
    assert ours.mean() <= 1.2 * theirs.mean() + 2e-5
    assert ours.max() <= 1.5 * theirs.max() + 1e-4


def check_scores(setting: Setting, parent: Path) -> None:
    """Scores through the kernels are those of the base model, and the next training step is what it was.

    Raises:
        AssertionError: they are not; or nothing here could have told.
    """
    folder = setting.folder(parent)
    base = setting.base(folder)
    truth, naive = scores(Reference(exact(base, folder, setting.device), "exact")), scores(Reference(base, "base"))
    model = adapted(base)
    with attention_patched(folder) as recipe:
        patches.apply_lora_kernel_patches(model, recipe)
        with watched() as trained:
            before = step(model)
        assert trained.names(True) == set(FUNCTIONS) and trained.given(True) == {True}, "training runs past the kernels"
        assert same(step(model), before), "this step does not repeat on this device"
        with watched() as called:
            found = scores(borrow(model))
        assert not called.names(True), "scoring wanted gradients"
        assert called.names(False) == ATTENTION, "scoring runs through other kernels than are thought to be right"
        assert called.given(False) == {False}, "a kernel was given the weights of an adapter"
        for name, values in truth.items():
            check_rounding(values, found[name], naive[name])
        adapters_on = scores(Reference(model.get_base_model(), "adapters on"))
        for name in ("logprobs", "input", "output"):
            assert gap(adapters_on[name], found[name]) > 0.2, f"{name} would not show adapters that are left on"
        assert same(step(model), before), "scoring changed the next training step"


def check_adapters_off(setting: Setting, parent: Path) -> None:
    """All four kernels leave adapters out where PEFT turned them off, whoever calls them.

    What they give then is the base model, but for Gemma, which is why scoring sets two of them aside.
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
        assert gap(off, naive) > 0.1, "these kernels are right for Gemma now: scoring need not set them aside"
    else:
        check_rounding(truth, off, naive)


def check_separate(setting: Setting, parent: Path) -> None:
    """A model without kernels, as a separate reference is, in a process whose attention class is patched."""
    folder = setting.folder(parent)
    base = setting.base(folder)
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    truth, naive = scores(Reference(exact(base, folder, setting.device), "exact")), scores(Reference(base, "base"))
    with attention_patched(folder):
        found = scores(Reference(base, "separate"))
    for name, values in truth.items():
        check_rounding(values, found[name], naive[name])
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
