"""What leaving noise out of the loss does to a real model: LoRA on noisy rows, then loss on clean ones, and samples.

Every arm of a seed sees the same rows in the same order and begins with the same adapter; arms differ in which labels
are left out, or in the loss. Random controls drop as many tokens as the default in spans of the same lengths.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests import real
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.plan import make_plan

from . import noise
from .detect import Provider, tokenized
from .texts import GOOD, Example, sample

SLOTS = {"RI": "reasoning_importance", "KN": "knowledge_novelty", "TR": "task_relevance"}
BATCH, LEARNING_RATE, RANK = 8, 5e-4, 16
HELD_OUT, SAMPLES, NEW_TOKENS = 60, 48, 160
ARMS = (
    *("plain", "oracle", "default", "random", "paper", "P < 0.1", "official", "DFT"),
    *("TR", "KN", "TR KN", "TR RI", "TR RI of all"),
)


@dataclass(frozen=True)
class Job:
    """One training run."""

    arm: str
    seed: int
    rate: float = 0.25
    rows: int = 160
    text: str = "GSM8K"
    model: str = real.SMOLLM2

    @property
    def key(self) -> str:
        """The name of its results."""
        return "train-" + "-".join(str(value) for value in asdict(self).values()).replace(" ", "_").replace(
            "<", "below"
        )


def block(arm: str) -> dict[str, Any] | None:
    """The block of an arm; None: it has none."""
    if arm in ("default", "random"):
        return {}
    if arm in ("paper", "official"):
        return {"preset": arm}
    if arm == "P < 0.1":
        return {"preset": "none", "knowledge_novelty": {"drop": {"unknown_below": 0.1}}}
    if arm == "TR RI of all":
        return {"knowledge_novelty": False, "reasoning_importance": {"among": None}}
    on = arm.split()
    if set(on) <= SLOTS.keys():
        return {slot: name in on for name, slot in SLOTS.items()}
    return None


def run(job: Job, data: Path, cache: Path) -> dict[str, Any]:
    """Train and measure one arm, as JSON."""
    begun = time.perf_counter()
    tokenizer, (train, test) = real.tokenizer(job.model), split(job, data)
    model = real.load(job.model, "bf16")
    documents, kinds = tokenized(train, tokenizer)
    keep = kept(job, documents, kinds, Provider(job.model, "bf16", model), tokenizer, cache)
    scored = time.perf_counter() - begun
    torch.manual_seed(job.seed)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    fit(adapted, documents, keep, job)
    held_out, _ = tokenized(test, tokenizer)
    losses = clean_loss(adapted, held_out, tokenizer)
    emitted = emissions(adapted, test[:SAMPLES], tokenizer, job.seed)
    good = kinds == GOOD
    return {
        **asdict(job),
        "dropped_good": float((~keep[good]).mean()),
        "dropped_noise": float((~keep[~good]).mean()) if (~good).any() else 0.0,
        **losses,
        "emitted": emitted,
        "scoring_seconds": scored,
        "seconds": time.perf_counter() - begun,
    }


def split(job: Job, data: Path) -> tuple[list[Example], list[Example]]:
    """Noisy rows to train on, and clean ones that are held out; another seed has other rows."""
    chosen, others = sample(job.text, data, job.rows + HELD_OUT, 100 + job.seed)
    rng = random.Random(f"{job.text} {job.seed} {job.rate}")
    clean = chosen[: job.rows]
    return [noise.plant(one, others, job.rate, rng) if job.rate else one for one in clean], chosen[job.rows :]


def kept(
    job: Job, documents: DocumentSet, kinds: NDArray[Any], provider: Provider, tokenizer: Any, cache: Path
) -> NDArray[np.bool_]:
    """The completion tokens that keep their labels."""
    if job.arm == "oracle":
        return np.asarray(kinds == GOOD, dtype=bool)
    settings = block(job.arm)
    if settings is None:
        return np.ones(len(kinds), dtype=bool)
    config = XTFConfig(**settings, cache_dir=str(cache))
    keep = make_plan(config, documents, provider, tokenizer, progress=False).selection.keep
    return elsewhere(keep, documents, random.Random(job.seed)) if job.arm == "random" else keep


def elsewhere(keep: NDArray[np.bool_], documents: DocumentSet, rng: random.Random) -> NDArray[np.bool_]:
    """As many dropped spans of the same lengths in every document, at random places."""
    result = np.ones_like(keep)
    for low, high in zip(documents.completion_offsets[:-1], documents.completion_offsets[1:], strict=True):
        at = np.flatnonzero(~keep[low:high])
        spans = [len(part) for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if len(part)]
        free = int(high - low) - sum(spans)
        rng.shuffle(spans)
        gaps = sorted(rng.randint(0, free) for _ in spans)
        moved = 0
        for gap, length in zip(gaps, spans, strict=True):
            begin = int(low) + gap + moved
            result[begin : begin + length] = False
            moved += length
    return result


def batches(documents: DocumentSet, order: list[int], keep: NDArray[np.bool_] | None) -> list[tuple[Tensor, Tensor]]:
    """Padded token ids and labels, (B, T) each."""
    found = []
    for low in range(0, len(order), BATCH):
        rows = order[low : low + BATCH]
        longest = int(documents.lengths[rows].max())
        ids, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
        for place, row in enumerate(rows):
            tokens, completion = documents.document(row)
            own = torch.from_numpy(tokens.astype(np.int64))
            mask = np.array(completion)
            if keep is not None:
                mask[completion] = keep[documents.completion_offsets[row] : documents.completion_offsets[row + 1]]
            ids[place, : len(tokens)] = own
            labels[place, : len(tokens)][torch.from_numpy(mask)] = own[torch.from_numpy(mask)]
        found.append((ids, labels))
    return found


def losses_of(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every labelled token, and its id."""
    logits = model(input_ids=ids).logits  # padding is on the right: no labelled token sees it
    wanted = labels[:, 1:] != -100
    targets = labels[:, 1:][wanted]
    return torch.nn.functional.cross_entropy(logits[:, :-1][wanted].float(), targets, reduction="none"), targets


def fit(model: Any, documents: DocumentSet, keep: NDArray[np.bool_], job: Job) -> None:
    """One epoch; the loss is the mean over the labels of a batch."""
    order = list(range(len(documents)))
    random.Random(job.seed).shuffle(order)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    every = batches(documents, order, keep)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(every))
    model.train()
    for ids, labels in every:
        if not (labels != -100).any():
            continue
        each, _ = losses_of(model, ids, labels)
        if job.arm == "DFT":
            each = each * torch.exp(-each.detach())
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def clean_loss(model: Any, documents: DocumentSet, tokenizer: Any) -> dict[str, float]:
    """Mean loss of held-out clean completions, and of their tokens with a digit."""
    losses, targets = [], []
    for ids, labels in batches(documents, list(range(len(documents))), None):
        each, own = losses_of(model, ids, labels)
        losses.append(each)
        targets.append(own)
    loss, target = torch.cat(losses), torch.cat(targets)
    digits = torch.tensor([any(map(str.isdigit, tokenizer.decode([index]))) for index in target.tolist()])
    return {"loss": float(loss.mean()), "loss_digits": float(loss[digits].mean()) if digits.any() else float("nan")}


@torch.no_grad()
def emissions(model: Any, prompts: list[Example], tokenizer: Any, seed: int) -> float:
    """Share of completions, sampled at temperature 1, that hold noise of a planted kind."""
    torch.manual_seed(seed)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    texts = [(tokenizer.bos_token or "") + one.prompt for one in prompts]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS}
    made = model.generate(**given, **sampling, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([has_noise(one.prompt, text) for one, text in zip(prompts, texts, strict=True)]))


def has_noise(prompt: str, text: str) -> bool:
    """Whether a completion holds a planted phrase, a sentence of its prompt, or a line twice."""
    plain = _plain(text)
    phrases = (_plain(phrase)[:24] for pool in noise._known().values() for phrase in pool)
    if any(phrase in plain for phrase in phrases if len(phrase) >= 12):
        return True
    copied = (_plain(part) for part in noise.pieces(prompt))
    lines = [_plain(part) for part in noise.pieces(text)]
    long = [line for line in lines if len(line) > noise.SHORTEST]
    return len(long) != len(set(long)) or any(part in plain for part in copied if len(part) > 2 * noise.SHORTEST)


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
