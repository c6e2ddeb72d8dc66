"""Tiny models, a tokenizer and datasets for the tests: made from configs at fixed seeds, no hub, no downloads."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ["Ana", "Ben", "Chloe", "Dev", "Eli", "Fay"]
THINGS = ["apples", "books", "coins", "pens", "shells", "stamps"]


def problem(rng: random.Random) -> tuple[str, str]:
    """A short word problem and its worked answer."""
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 40), rng.randint(2, 40)
    prompt = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?"
    return prompt, f" {name} starts with {a} {thing}. {a} + {b} = {a + b}. Sure, happy to help! The answer is {a + b}."


def problems(n: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    pairs = (problem(rng) for _ in range(n))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def conversations(n: int, seed: int = 0, turns: int = 2) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        messages = []
        for _ in range(turns):
            prompt, completion = problem(rng)
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        rows.append({"messages": messages})
    return rows


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((row["prompt"] + row["completion"] for row in problems(300, seed=9)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "gpt_neox": ("GPTNeoX", {}),
    "granite": ("Granite", {"logits_scaling": 2.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}


def model(family: str = "llama", seed: int = 0, vocab_size: int | None = None, **changes: Any) -> Any:
    """A randomly initialised model of a family; weights large enough that attention and probabilities are not
    uniform.
    """
    prefix, extra = FAMILIES[family]
    fast = tokenizer()
    ids = {"pad_token_id": fast.pad_token_id, "eos_token_id": fast.eos_token_id, "bos_token_id": None}
    config_class = getattr(transformers, f"{prefix}Config")
    config = config_class(**{**BASE, **extra, **ids, "vocab_size": vocab_size or len(fast), **changes})
    torch.manual_seed(seed)
    name = "Gemma3ForCausalLM" if family == "gemma3" else f"{prefix}ForCausalLM"
    made = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    return made.eval()


def save_base(folder: Path, **changes: Any) -> Path:
    """Write a tiny Llama and the tokenizer where `model_name_or_path` can point."""
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
