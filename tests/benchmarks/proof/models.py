"""Base models trained from scratch on clean text, and exact-match accuracy of any model on held-out problems.

Dims: B batch, T tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import BASES, Encoder, base_documents
from .worlds import Problem

IGNORE = -100
ANSWER_MARK = "Answer:"


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
    rng, queue, start, seen = random.Random(settings.seed), [], time.perf_counter(), 0
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
        documents = base_documents(BASES[name], settings.documents, settings.seed, Encoder(tokenizer))
        model = train_base(documents, tokenizer, settings, log)
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    return target


@torch.no_grad()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    limit: int = 110,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Greedy completions (or samples at a temperature), without EOS; prompts of equal length share a batch."""
    where = model.device
    generator = torch.Generator(where).manual_seed(seed)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    results: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    for members in groups.values():
        ids, cache = torch.tensor([prompts[i] for i in members], device=where), None
        alive = torch.ones(len(members), dtype=torch.bool, device=where)
        for _ in range(limit):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1], output.past_key_values
            if temperature:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1)
            alive &= chosen != tokenizer.eos_token_id
            if not bool(alive.any()):
                break
            for row in alive.nonzero()[:, 0].tolist():
                results[members[row]].append(int(chosen[row]))
            ids = chosen[:, None]
    model.train(was_training)
    return results


def answers(completions: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """What stands behind the first answer mark, up to the line's end; empty without one."""
    found = []
    for ids in completions:
        _, mark, rest = tokenizer.decode(ids).partition(ANSWER_MARK)
        found.append(rest.split("\n", 1)[0].strip() if mark else "")
    return found


def accuracy(model: Any, problems: Sequence[Problem], encoder: Encoder, **options: Any) -> float:
    """Share of problems whose answer is exactly right."""
    prompts = [encoder.prompt(problem) for problem in problems]
    given = answers(complete(model, prompts, encoder.tokenizer, **options), encoder.tokenizer)
    return sum(a == p.answer for a, p in zip(given, problems, strict=True)) / len(problems)
