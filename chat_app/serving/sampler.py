"""Draw the next token of each row: greedy, or top-k, top-p, min-p and temperature in llama.cpp's order.

The same limits in the same order as the embedded engine has them, so that a version is drawn alike wherever it is
served. Each row has dice of its own: what else is in the batch does not change what they throw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from chat_app.serving.engine import Sampling
from chat_app.serving.llama_engine import MIN_P, TOP_K


def dice(seed: int | None) -> random.Random:
    """The dice of one answer; None: any."""
    return random.Random(seed)  # noqa: S311 - answers that can be drawn again, not a secret


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], rows_dice: Sequence[random.Random]) -> list[int | None]:
    """A token for each row of `logits` (rows × vocabulary); None for a row whose logits are not finite.

    A row with temperature 0 throws no dice.
    """
    scores, tokens = (part.cpu() for part in logits.float().topk(min(TOP_K, logits.shape[-1])))
    best = logits.argmax(-1).tolist()  # the first of equals, as everybody's greedy search has it
    places = _places(scores.double(), samplings, rows_dice)
    finite = scores[:, 0].isfinite().tolist()
    return [
        None if not finite[row] else best[row] if sampling.temperature == 0 else int(tokens[row, places[row]])
        for row, sampling in enumerate(samplings)
    ]


def _places(scores: torch.Tensor, samplings: Sequence[Sampling], rows_dice: Sequence[random.Random]) -> list[int]:
    """Which of its candidates (best first) each row draws."""
    if all(sampling.temperature == 0 for sampling in samplings):
        return [0] * len(samplings)
    temperature = torch.tensor([[sampling.temperature or 1.0] for sampling in samplings], dtype=torch.double)
    top_p = torch.tensor([[sampling.top_p] for sampling in samplings], dtype=torch.double)
    throws = [throw.random() if draw.temperature else 0.0 for draw, throw in zip(samplings, rows_dice, strict=True)]
    thrown = torch.tensor(throws, dtype=torch.double)[:, None]
    chances = scores.softmax(-1)
    kept = (chances.cumsum(-1) - chances < top_p) & (chances >= MIN_P * chances[:, :1])
    weights = ((scores - scores[:, :1]) / temperature).exp() * kept
    reached = weights.cumsum(-1)
    places = torch.searchsorted(reached, thrown * reached[:, -1:], right=True)
    last_kept = kept.sum(-1, keepdim=True) - 1  # rounding may throw exactly the whole
    return [int(place) for place in torch.minimum(places, last_kept)]
