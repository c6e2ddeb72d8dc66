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
from tests.benchmarks import common
from xtf_plugin.config.block import XTFConfig
from xtf_plugin.data.documents import DocumentSet
from xtf_plugin.plan import make_plan

from . import formats, noise
from .detect import Provider, tokenized
from .texts import GOOD, Example, sample

SLOTS = {"RI": "reasoning_importance", "KN": "knowledge_novelty", "TR": "task_relevance"}
LEARNING_RATE, RANK, NEW_TOKENS = 1e-3, 16, 128
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
    rows: int = 200
    text: str = "GSM8K"
    model: str = real.SMOLLM2

    @property
    def large(self) -> bool:
        """Whether it is for a GPU: larger batches, more held-out rows, and answers that are checked."""
        return self.model != real.SMOLLM2

    @property
    def batch(self) -> int:
        """Rows of a batch."""
        return 16 if self.large else 4

    @property
    def held_out(self) -> int:
        """Rows that are not trained on."""
        return 200 if self.large else min(60, self.rows)

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
    noisy = [noise.plant(one, train, 0.25, random.Random(f"held out {job.seed}")) for one in test]
    model = real.load(job.model, "bf16", common.device())
    documents, kinds = tokenized(train, tokenizer)
    keep = kept(job, documents, kinds, Provider(job.model, "bf16", model), tokenizer, cache)
    scored = time.perf_counter() - begun
    torch.manual_seed(job.seed)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    fit(adapted, documents, keep, job)
    held_out, _ = tokenized(test, tokenizer)
    losses = clean_loss(adapted, held_out, tokenizer)
    losses |= {"loss_noise": noise_loss(adapted, *tokenized(noisy, tokenizer))}
    good = kinds == GOOD
    sampled = samples(adapted, test, tokenizer, job.seed)
    return {
        **asdict(job),
        "dropped_good": float((~keep[good]).mean()),
        "dropped_noise": float((~keep[~good]).mean()) if (~good).any() else 0.0,
        **losses,
        "emitted": float(np.mean([has_noise(one.prompt, text) for one, text in zip(test, sampled, strict=True)])),
        **({"exact_match": exact_match(adapted, test, tokenizer)} if job.large else {}),
        **(in_format(job.text, sampled, greedy(adapted, test, tokenizer)) if job.text in formats.FORMATS else {}),
        "scoring_seconds": scored,
        "seconds": time.perf_counter() - begun,
    }


def split(job: Job, data: Path) -> tuple[list[Example], list[Example]]:
    """Noisy rows to train on, and clean ones that are held out; another seed has other rows."""
    if job.text in formats.FORMATS:
        return formats.split(job.text, data, job.rows, job.held_out, job.rate, 100 + job.seed)
    chosen, others = sample(job.text, data, job.rows + job.held_out, 100 + job.seed)
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


def batches(
    documents: DocumentSet, order: list[int], keep: NDArray[np.bool_] | None, size: int
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Rows of each batch, with padded token ids and labels, (B, T) each."""
    found = []
    for low in range(0, len(order), size):
        rows = order[low : low + size]
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
        found.append((rows, ids, labels))
    return found


def losses_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Loss of every labelled token, row by row."""
    wanted = labels[:, 1:] != -100
    decoder, head = model.get_base_model().get_decoder(), model.get_output_embeddings()
    hidden = decoder(input_ids=ids.to(model.device)).last_hidden_state  # padding is on the right: no label sees it
    logits = head(hidden[:, :-1][wanted.to(model.device)]).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted].to(model.device), reduction="none")


def order_of(documents: DocumentSet, seed: int, batch: int) -> list[int]:
    """Rows in random order, those of a batch of like length, so that little is padding."""
    rng, rows = random.Random(seed), list(range(len(documents)))
    rng.shuffle(rows)
    pool = 8 * batch
    pools = [
        sorted(rows[low : low + pool], key=lambda row: documents.lengths[row]) for low in range(0, len(rows), pool)
    ]
    parts = [own[low : low + batch] for own in pools for low in range(0, len(own), batch)]
    rng.shuffle(parts)
    return [row for part in parts for row in part]


def fit(model: Any, documents: DocumentSet, keep: NDArray[np.bool_], job: Job) -> None:
    """One epoch; the loss is the mean over the labels of a batch."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    every = batches(documents, order_of(documents, job.seed, job.batch), keep, job.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(every))
    model.train()
    for _, ids, labels in every:
        if not (labels != -100).any():
            continue
        each = losses_of(model, ids, labels)
        if job.arm == "DFT":
            each = each * torch.exp(-each.detach())
        each.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def clean_loss(model: Any, documents: DocumentSet, tokenizer: Any) -> dict[str, Any]:
    """Mean loss of held-out clean completions, of their tokens with a digit, and of their final answers.

    `losses` has the mean of each completion: arms of a seed share completions, so they are compared in pairs.
    """
    losses = every_loss(model, documents)
    ids = [tokens[completion] for tokens, completion in map(documents.document, range(len(documents)))]
    texts = [[tokenizer.decode([index]) for index in own.tolist()] for own in ids]
    digits = np.asarray([any(map(str.isdigit, text)) for own in texts for text in own])
    final = np.concatenate([_final(own) for own in texts])
    every = np.concatenate(losses)
    return {
        "loss": float(every.mean()),
        "loss_digits": _mean(every[digits]),
        "loss_answers": _mean(every[digits & final]),
        "losses": [float(own.mean()) for own in losses],
    }


@torch.no_grad()
def every_loss(model: Any, documents: DocumentSet) -> list[NDArray[np.float64]]:
    """Loss of every completion token, document by document."""
    order = sorted(range(len(documents)), key=lambda row: documents.lengths[row])
    by_row: dict[int, NDArray[np.float64]] = {}
    for rows, ids, labels in batches(documents, order, None, 8):
        each = losses_of(model, ids, labels).double().cpu().numpy()
        sizes = (labels[:, 1:] != -100).sum(dim=1).tolist()
        by_row |= dict(zip(rows, np.split(each, np.cumsum(sizes)[:-1]), strict=True))
    return [by_row[row] for row in range(len(documents))]


def noise_loss(model: Any, documents: DocumentSet, kinds: NDArray[Any]) -> float:
    """Mean loss of planted phrases in held-out completions: the higher, the less the model writes them."""
    planted = np.isin(kinds, list(noise.NEW))
    return _mean(np.concatenate(every_loss(model, documents))[planted])


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _final(texts: list[str]) -> NDArray[np.bool_]:
    """Which tokens of a completion stand after its last `####`, the mark of the answer in GSM8K."""
    before = np.cumsum([0, *map(len, texts)])[:-1]
    return before > (place if (place := "".join(texts).rfind("####")) >= 0 else np.inf)


def samples(model: Any, prompts: list[Example], tokenizer: Any, seed: int) -> list[str]:
    """Completions, sampled at temperature 1."""
    torch.manual_seed(seed)
    return written(model, prompts, tokenizer, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


def greedy(model: Any, prompts: list[Example], tokenizer: Any) -> list[str]:
    """Completions of the most probable tokens."""
    return written(model, prompts, tokenizer, do_sample=False, temperature=None, top_k=None, top_p=None)


def in_format(name: str, sampled: list[str], most_probable: list[str]) -> dict[str, float]:
    """Shares of completions that a format's reader accepts."""
    holds = formats.FORMATS[name].holds
    return {
        "in_format": float(np.mean([holds(text) for text in sampled])),
        "in_format_greedy": float(np.mean([holds(text) for text in most_probable])),
    }


def exact_match(model: Any, prompts: list[Example], tokenizer: Any) -> float:
    """Share of greedy completions with the right number behind `####`."""
    pairs = zip(prompts, greedy(model, prompts, tokenizer), strict=True)
    return float(np.mean([_answer(text) == _answer(one.completion) is not None for one, text in pairs]))


def _answer(text: str) -> str | None:
    found = re.search(r"####\s*(-?[\d,.]*\d)", text)
    return found[1].replace(",", "") if found else None


@torch.no_grad()
def written(model: Any, prompts: list[Example], tokenizer: Any, **sampling: Any) -> list[str]:
    """What a model writes after some prompts."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    texts = [(tokenizer.bos_token or "") + one.prompt for one in prompts]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    made = model.generate(**given, **sampling, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)
    found: list[str] = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


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
