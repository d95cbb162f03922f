"""Log-probabilities of answer tokens, from hidden states to numbers, without ever holding all logits.

The LM head runs on answer tokens only, `CHUNK` of them at a time. While a chunk's probabilities are at hand, the
gradient towards its hidden states is worked out too (up to the factor that backward brings), so that backward needs no
second pass over the vocabulary. A head that is itself trained costs that second pass, for its own gradient.

What TRL logs beside the loss falls out of the same numbers: with p the probabilities and W the head, the expected
logit is h · (p W), which the gradient needs anyhow, so the entropy is free; the mean logit is h · mean(W).

Covered: heads that are one matrix without bias, soft cap or scale. Others: `plain_head` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # tokens: the logits of a chunk, 49,152 wide, are 12 MB and stay in the cache of a CPU
CHUNK_ON_GPU = 2048
_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """For each answer token, float32: its log-probability (with gradient), and what is logged (without)."""

    logps: Tensor
    entropy: Tensor
    mean_logit: Tensor
    is_top1: Tensor


def plain_head(model: Any) -> str | None:
    """Why the head of this causal LM cannot be computed here; None when it can."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point():
        return "the LM head is not one plain matrix"
    if head.bias is not None:
        return "the LM head has a bias"
    scale = next((name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)), None)
    return f"the logits go through {scale}" if scale else None


def score_tokens(hidden: Tensor, head: Tensor, targets: Tensor) -> TokenScores:
    """Score `targets` [n] by the hidden states [n, size] that predict them and the head [vocabulary, size]."""
    logps, entropy, mean_logit, is_top1 = _ScoreTokens.apply(hidden, head, targets)
    return TokenScores(logps, entropy, mean_logit, is_top1)


class _ScoreTokens(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        device = hidden.device.type
        ctx.chunk = CHUNK if device == "cpu" else CHUNK_ON_GPU
        ctx.wants_head = ctx.needs_input_grad[1]
        ctx.given = hidden.dtype
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        weight = head.to(hidden.dtype)
        logps, entropy, is_top1 = (torch.zeros(len(targets), device=hidden.device) for _ in range(3))
        towards_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            wanted = targets[part, None]
            logits = hidden[part] @ weight.t()
            each = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            logps[part] = each.gather(1, wanted)[:, 0]
            if towards_hidden is None:
                continue
            is_top1[part] = (logps[part] >= each.amax(dim=1)).float()
            expected = each.exp_().to(weight.dtype) @ weight
            log_total = logits.gather(1, wanted)[:, 0].float() - logps[part]
            entropy[part] = log_total - (hidden[part].float() * expected.float()).sum(dim=1)
            towards_hidden[part] = weight[wanted[:, 0]] - expected
        mean_logit = hidden.float() @ weight.mean(dim=0, dtype=torch.float32)
        ctx.save_for_backward(towards_hidden, *((hidden, head, targets) if ctx.wants_head else ()))
        ctx.mark_non_differentiable(entropy, mean_logit, is_top1)
        return logps, entropy, mean_logit, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        towards_hidden, *kept = ctx.saved_tensors
        towards_head = None
        if ctx.wants_head:
            hidden, head, targets = kept
            weight = head.to(hidden.dtype)
            towards_head = torch.zeros_like(weight, dtype=torch.float32)
            for start in range(0, len(targets), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                wrong = torch.softmax(hidden[part] @ weight.t(), dim=-1, dtype=torch.float32).neg_()
                wrong.scatter_add_(1, targets[part, None], torch.ones_like(wrong[:, :1]))
                towards_head += (wrong.mul_(grad[part, None]).to(hidden.dtype).t() @ hidden[part]).float()
            towards_head = towards_head.to(head.dtype)
        if towards_hidden is None:
            return None, towards_head, None
        return (towards_hidden * grad[:, None].to(towards_hidden.dtype)).to(ctx.given), towards_head, None
