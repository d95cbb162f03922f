"""Log-probabilities of answer tokens, from hidden states to numbers, without ever holding all logits.

The LM head runs on answer tokens only, a tile of some tokens by some words of the vocabulary at a time, the softmax
kept up to date from tile to tile as FlashAttention does it (Dao et al., 2022), so that a tile never leaves the cache of
a CPU. In the same pass the expected row of the head is summed up, sum of p(word) · head[word]: the gradient towards a
hidden state is the target's row minus that (times the factor backward brings), so backward needs no second pass over
the vocabulary. A head that is itself trained costs that second pass, for its own gradient.

What TRL logs beside the loss falls out of it: the expected logit is the hidden state times the expected row, so the
entropy is free, and the mean logit is the hidden state times the head's mean row.

Covered: heads that are one matrix without bias, soft cap or scale. Of others `plain_head` says what is in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = (2048, 512)  # words, tokens: 4 MB of logits
TILE_ON_GPU = (16384, 4096)
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
        ctx.given = hidden.dtype
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        weight = head.to(hidden.dtype)
        ctx.wants_hidden, ctx.wants_head, _ = ctx.needs_input_grad
        highest = torch.full((len(targets), 1), -torch.inf, device=hidden.device)
        total, target_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        expected = hidden.new_zeros(hidden.shape, dtype=torch.float32) if ctx.wants_hidden else None
        for words, tokens in _tiles(weight, targets):
            piece = weight[words]
            logits = (hidden[tokens] @ piece.t()).float()
            place = targets[tokens, None] - words.start
            inside = (place >= 0) & (place < len(piece))
            target_logit[tokens] += logits.gather(1, place.clamp(0, len(piece) - 1)) * inside
            now = torch.maximum(highest[tokens], logits.amax(dim=1, keepdim=True))
            shrink = (highest[tokens] - now).exp_()
            chances = logits.sub_(now).exp_()
            total[tokens] = total[tokens] * shrink + chances.sum(dim=1, keepdim=True)
            highest[tokens] = now
            if expected is not None:
                expected[tokens] = (expected[tokens] * shrink).add_(chances.to(piece.dtype) @ piece)
        log_total = highest + total.log()
        logps, is_top1 = (target_logit - log_total)[:, 0], (target_logit >= highest)[:, 0].float()
        mean_logit = hidden.float() @ weight.mean(dim=0, dtype=torch.float32)
        entropy, towards_hidden = torch.zeros_like(logps), None
        if expected is not None:
            expected /= total
            entropy = log_total[:, 0] - (hidden.float() * expected).sum(dim=1)
            towards_hidden = (weight[targets] - expected).to(hidden.dtype)
        ctx.save_for_backward(towards_hidden, *((hidden, head, targets, log_total) if ctx.wants_head else ()))
        ctx.mark_non_differentiable(entropy, mean_logit, is_top1)
        return logps, entropy, mean_logit, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
        towards_hidden, *kept = ctx.saved_tensors
        towards_head = None
        if ctx.wants_head:
            hidden, head, targets, log_total = kept
            weight = head.to(hidden.dtype)
            scaled = hidden * grad[:, None].to(hidden.dtype)
            towards_head = torch.zeros_like(weight, dtype=torch.float32)
            for words, tokens in _tiles(weight, targets):
                chances = ((hidden[tokens] @ weight[words].t()).float() - log_total[tokens]).exp_()
                towards_head[words] -= (chances.to(hidden.dtype).t() @ scaled[tokens]).float()
            towards_head.index_add_(0, targets, scaled.float())
            towards_head = towards_head.to(head.dtype)
        if not ctx.wants_hidden:
            return None, towards_head, None
        return (towards_hidden * grad[:, None].to(towards_hidden.dtype)).to(ctx.given), towards_head, None


def _tiles(weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pieces of the vocabulary, and for each all pieces of the tokens."""
    many_words, many_tokens = TILE if weight.device.type == "cpu" else TILE_ON_GPU
    for word in range(0, len(weight), many_words):
        for token in range(0, len(targets), many_tokens):
            yield slice(word, word + many_words), slice(token, token + many_tokens)
