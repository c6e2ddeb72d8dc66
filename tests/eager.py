"""An independent float32 computation of the scores from transformers' eager attention maps and full logits.

It shares no code with the package and takes one document at a time.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def scores(model, input_ids, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token (NaN for the first) and attention received (NaN for the last), (T,) each."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    given = torch.as_tensor(input_ids, device=model.device)
    output = model(input_ids=given[None], output_attentions=True, use_cache=False)
    model.config._attn_implementation = before
    T = len(input_ids)
    logprobs = torch.full((T,), float("nan"))
    picked = output.logits[0, :-1].float().log_softmax(-1)
    logprobs[1:] = picked.gather(-1, given[1:, None])[:, 0].cpu()
    position = torch.arange(T, device=model.device)
    later = position[:, None] > position  # (q, k)
    received = torch.zeros(T)
    for layer in layers:
        A = output.attentions[layer][0].float().mean(0)  # (T, T)
        weighted = (A * (position[:, None] + 1) * later).sum(0)
        received += (weighted / later.sum(0).clamp(min=1)).cpu() / len(layers)
    received[-1] = float("nan")
    return logprobs, received


@torch.no_grad()
def expectations(model, input_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the surprisal before each token (NaN for the first), in float64, (T,) each."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused attention of early versions ignores the soft cap of Gemma 2
    logits = model(input_ids=torch.as_tensor(input_ids)[None], use_cache=False).logits[0, :-1].double()
    model.config._attn_implementation = before
    p, surprisal = logits.softmax(-1), -logits.log_softmax(-1)
    mean = (p * surprisal).sum(-1)
    deviation = ((p * surprisal**2).sum(-1) - mean**2).sqrt()
    first = torch.full((1,), float("nan"), dtype=torch.float64)
    return torch.cat([first, mean]), torch.cat([first, deviation])
