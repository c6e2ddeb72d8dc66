"""Base models trained from scratch on clean text, and exact-match accuracy of any model on held-out problems.

Dims: B batch, T tokens.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import BASES, SMALL, Encoder, base_documents, train_tokenizer
from .worlds import Problem

IGNORE = -100
ANSWER_MARK = "Answer:"
LIMIT = 200  # tokens of a completion; noisy solutions are longer than clean ones, and length is not what is measured


def device() -> torch.device:
    """Where models train and answer."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class BaseSettings:
    """Size and training of a base model; linear sizes are multiples of 64, the block size of 4-bit quantisation."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    documents: int = 8_000  # and steps: for each part that a base model reads
    batch_tokens: int = 3_072
    steps: int = 200
    learning_rate: float = 6e-3
    warmup: int = 50
    seed: int = 0


def build(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlamaForCausalLM:
    """An untrained Llama that fits the tokenizer."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64 * math.ceil(len(tokenizer) / 64),
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(documents: Sequence[Sequence[int]], tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices of documents of like length, at most `tokens` padded tokens a batch, in random order."""
    order = sorted(range(len(documents)), key=lambda i: (len(documents[i]), rng.random()))
    result, low = [], 0
    while low < len(order):
        high = low
        while high < len(order) and (high + 1 - low) * len(documents[order[high]]) <= tokens:
            high += 1
        result.append(order[low : max(high, low + 1)])
        low = max(high, low + 1)
    rng.shuffle(result)
    return result


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids padded on the right, (B, T) int64. Causal attention needs no mask for that."""
    T = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows])


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, which here halves the steps that AdamW needs, AdamW for everything else."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_base(
    documents: Sequence[Sequence[int]], tokenizer: Any, settings: BaseSettings, log: Callable[[str], None] = print
) -> LlamaForCausalLM:
    """Next-token training with warm-up and a cosine, in float32."""
    model = build(tokenizer, settings).to(device())
    steppers = optimizers(model, settings.learning_rate)
    rng, start, seen = random.Random(settings.seed), time.perf_counter(), 0
    queue: list[list[int]] = []
    model.train()
    for step in range(settings.steps):
        if not queue:
            queue = batches(documents, settings.batch_tokens, rng)
        chosen = [documents[i] for i in queue.pop()]
        ids, labels = (padded(chosen, value).to(device()) for value in (0, IGNORE))
        progress = max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup)
        factor = min(1, (step + 1) / settings.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in (group for stepper in steppers for group in stepper.param_groups):
            group["lr"] = settings.learning_rate * factor
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        seen += ids.numel()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            speed = seen / (time.perf_counter() - start)
            log(f"  {settings.steps - step - 1} steps left, loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    return model.eval()


def make_base(
    name: str, folder: Path, tokenizer: Any, settings: BaseSettings, log: Callable[[str], None] = print
) -> Path:
    """Train the base model `name` of `data.BASES` and save it below `folder`, unless it is there."""
    target = folder / f"base-{name}"
    if not (target / "config.json").exists():
        log(f"base model {name}: {' + '.join(BASES[name])}")
        parts = len(BASES[name])
        settings = replace(settings, steps=settings.steps * parts, documents=settings.documents * parts)
        if name == SMALL:
            settings = replace(settings, hidden=settings.hidden // 2, intermediate=settings.intermediate // 2, layers=2)
        documents = base_documents(BASES[name], settings.documents, settings.seed, Encoder(tokenizer))
        model = train_base(documents, tokenizer, settings, log)
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    return target


def _make_base(arguments: tuple[str, Path, BaseSettings]) -> None:
    from .finetune import quiet  # which itself needs this module

    name, folder, settings = arguments
    quiet()
    torch.set_num_threads(1)
    make_base(name, folder, train_tokenizer(), settings, lambda text: print(f"[{name}] {text.strip()}", flush=True))


def make_bases(folder: Path, settings: BaseSettings, workers: int) -> None:
    """Train the base models that are not there yet, the longest first.

    Not in `__main__`: a spawned process imports no package's `__main__`, and would not find its functions.
    """
    names = sorted(BASES, key=lambda name: -len(BASES[name]))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_make_base, [(name, folder, settings) for name in names], chunksize=1)


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    limit: int = LIMIT,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Greedy completions (or samples at a temperature), without EOS.

    All prompts go through together, padded on the left; finished ones leave the batch. A row's samples depend on the
    seed and on its place among the prompts, not on when others end.
    """
    where, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=where)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=where)
    place, cache, members = (mask.cumsum(1) - 1).clamp(min=0), None, torch.arange(len(prompts), device=where)
    generator = torch.Generator(where).manual_seed(seed)
    results: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    for _ in range(limit):
        output = model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
        if temperature:  # the largest of logits plus Gumbel noise is a sample of the softmax
            drawn = torch.rand((len(prompts), logits.shape[-1]), generator=generator, device=where)[members]
            logits = logits / temperature - (-drawn.log()).log()
        chosen = logits.argmax(-1)
        alive = chosen != tokenizer.eos_token_id
        for row, token in zip(members[alive].tolist(), chosen[alive].tolist(), strict=True):
            results[row].append(token)
        if not bool(alive.any()):
            break
        if not bool(alive.all()):
            members, chosen, mask, place = members[alive], chosen[alive], mask[alive], place[alive]
            cache.batch_select_indices(alive.nonzero()[:, 0])
        ids, place = chosen[:, None], place[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    model.train(was_training)
    return results


def answers(completions: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """What stands behind the first answer mark, up to the line's end; empty without one."""
    found = []
    for ids in completions:
        _, mark, rest = tokenizer.decode(ids).partition(ANSWER_MARK)
        found.append(rest.split("\n", 1)[0].strip() if mark else "")
    return found


def accuracy(
    model: Any, problems: Sequence[Problem], encoder: Encoder, *, limit: int = LIMIT, **options: Any
) -> tuple[float, float]:
    """Share of problems whose answer is exactly right, and share of completions that were cut at the limit."""
    prompts = [encoder.prompt(problem) for problem in problems]
    completions = complete(model, prompts, encoder.tokenizer, limit=limit, **options)
    given = answers(completions, encoder.tokenizer)
    right = sum(a == p.answer for a, p in zip(given, problems, strict=True))
    return right / len(problems), sum(len(ids) == limit for ids in completions) / len(problems)
