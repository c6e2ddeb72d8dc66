"""Trains the demo's base model: a Llama of two million weights that has learnt the language of small word problems.

A randomly initialised model would do for a smoke test, but its probabilities and attention mean nothing, and a token
filter is made of both. This one is trained from scratch on our own corpus in under two minutes on two idle CPU cores,
so that the demo needs neither a download nor a GPU. It writes fluent solutions with wrong sums: it predicts wording and
layout well, and is too small to copy and calculate. All Linear sizes are multiples of 64, the block size of 4-bit
quantisation.

Dims: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from settings import BaseSettings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# The same shape as the prompts of the data set, so that chat-style rows look familiar to the model too.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ 'Problem: ' + message['content'] + '\nSolution:' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Sequence[str], settings: BaseSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that reads numbers digit by digit and starts every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.context,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlamaForCausalLM:
    """An untrained Llama that fits the tokenizer; the vocabulary is rounded up to a multiple of 64."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All texts as `BOS text EOS`, one after the other, cut into rows of `length`; the incomplete rest is left out.

    Returns:
        int64 token ids and positions, both (rows, T). Positions restart at 0 with every text and every row: from that
        transformers builds a mask that keeps the texts of a row from seeing each other.
    """
    ids: list[int] = []
    positions: list[int] = []
    for text in tokenizer(list(texts))["input_ids"]:
        ids += (*text, tokenizer.eos_token_id)
        for _ in range(len(text) + 1):
            at_start = len(positions) % length == 0 or len(positions) == len(ids) - len(text) - 1
            positions.append(0 if at_start else positions[-1] + 1)
    rows = len(ids) // length
    shape = (rows, length)
    return torch.tensor(ids[: rows * length]).view(shape), torch.tensor(positions[: rows * length]).view(shape)


def learning_rate_factor(step: int, settings: BaseSettings) -> float:
    """Linear warm-up, then a cosine down to a twentieth, as a factor of the peak learning rate."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM,
    rows: torch.Tensor,
    positions: torch.Tensor,
    settings: BaseSettings,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Next-token training with AdamW for `settings.steps` batches, in float32.

    No bfloat16 autocast on purpose: on a CPU without bfloat16 units it took three times as long as float32.

    Returns:
        The mean cross entropy of each step, in nats.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    order, losses, start = random.Random(settings.seed), [], time.perf_counter()
    queue: list[int] = []
    model.train()
    for step in range(settings.steps):
        while len(queue) < settings.batch:
            queue += order.sample(range(len(rows)), len(rows))
        picked, queue = queue[: settings.batch], queue[settings.batch :]
        batch = rows[picked]  # (B, T)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
        loss = model(input_ids=batch, position_ids=positions[picked], labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            speed = (step + 1) * batch.numel() / (time.perf_counter() - start)
            log(f"  step {step + 1:4d}/{settings.steps}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
    return losses


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """exp of the mean negative log-probability per token over `texts`, each read on its own from BOS to EOS."""
    model.eval()
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])  # (1, T)
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    return math.exp(total / count)


def unigram_perplexity(rows: torch.Tensor) -> float:
    """exp of the entropy of the token frequencies in `rows`: what a model that ignores the context could reach."""
    counts = torch.bincount(rows.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def make_base(
    corpus: Sequence[str],
    held_out: Sequence[str],
    folder: Path,
    settings: BaseSettings,
    log: Callable[[str], None] = print,
) -> float:
    """Train tokenizer and model on `corpus`, save both under `folder` and return the perplexity on `held_out`."""
    tokenizer = train_tokenizer(corpus, settings)
    rows, positions = pack(corpus, tokenizer, settings.length)
    model = build_model(tokenizer, settings)
    log(
        f"base model: {model.num_parameters():,} weights, vocabulary {len(tokenizer)}, corpus {rows.numel():,} tokens, "
        f"unigram perplexity {unigram_perplexity(rows):.0f}"
    )
    train(model, rows, positions, settings, log)
    result = perplexity(model, tokenizer, held_out)
    log(f"base model: perplexity {result:.2f} on {len(held_out)} unseen problems")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return result
