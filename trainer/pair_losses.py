"""DPO's losses from summed log-probabilities, and what is measured beside them. The formulas and names are TRL's.

`sigmoid` is DPO (Rafailov et al., 2023), `ipo` Azar et al. (2023) with the mean over tokens, `robust` Chowdhury et al.
(2024) for raters who err with a known rate, `apo_zero` D'Oosterlinck et al. (2024) for answers better than the model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.answer_logps import TokenScores
from trainer.pair_rows import Row, by_answer


@dataclass(frozen=True, slots=True)
class PairScores:
    """A row's log-probabilities by pair: all [pairs, 2] with chosen, then rejected, but `weight` [pairs].

    `ratios` are policy minus reference, in nats. Of `tokens` only counts; `entropy`, `mean_logit` and `top1` are sums.
    """

    logps: Tensor
    ratios: Tensor
    tokens: Tensor
    weight: Tensor
    entropy: Tensor
    mean_logit: Tensor
    top1: Tensor
    read: int

    @classmethod
    def of(cls, scores: TokenScores, row: Row, weight: Tensor, reference: Tensor) -> PairScores:
        """From the scores of the row's answer tokens."""
        logps = by_answer(scores.logps, row)
        lengths = [[pair.chosen, pair.rejected] for pair in row.layout.pairs]
        return cls(
            logps=logps,
            ratios=logps - reference,
            tokens=torch.tensor(lengths, device=logps.device),
            weight=weight,
            entropy=by_answer(scores.entropy, row),
            mean_logit=by_answer(scores.mean_logit, row),
            top1=by_answer(scores.is_top1, row),
            read=sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in row.layout.pairs),
        )

    @property
    def chosen_nll(self) -> Tensor:
        """Minus the log-probability of `chosen`, summed by weight; `sft` adds it, divided by tokens."""
        return -(self.logps[:, 0] * self.weight).sum()

    def measured(self, beta: float) -> dict[str, Tensor]:
        """Sums over the pairs that count, for the log."""
        real = self.weight > 0
        rewards = beta * self.ratios.detach()[real]
        logps, tokens = self.logps.detach()[real], self.tokens[real]
        return {
            "pairs": real.sum(),
            "read": torch.tensor(self.read, device=real.device),
            "tokens/chosen": tokens[:, 0].sum(),
            "tokens/rejected": tokens[:, 1].sum(),
            "entropy": self.entropy[real].sum(),
            "top1": self.top1[real, 0].sum(),
            "logits/chosen": self.mean_logit[real, 0].sum(),
            "logits/rejected": self.mean_logit[real, 1].sum(),
            "logps/chosen": logps[:, 0].sum(),
            "logps/rejected": logps[:, 1].sum(),
            "rewards/chosen": rewards[:, 0].sum(),
            "rewards/rejected": rewards[:, 1].sum(),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum(),
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
            "weights": self.weight.sum(),
        }


def pair_losses(kind: str, scores: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """The loss of each pair, [pairs], unweighted."""
    chosen, rejected = scores.ratios.unbind(dim=1)
    if kind == "sigmoid":
        return -logsigmoid(beta * (chosen - rejected))
    if kind == "robust":
        clean, flipped = logsigmoid(beta * (chosen - rejected)), logsigmoid(-beta * (chosen - rejected))
        return ((label_smoothing - 1) * clean + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if kind == "ipo":
        each = scores.ratios / scores.tokens.clamp(min=1)
        return (each[:, 0] - each[:, 1] - 1 / (2 * beta)) ** 2
    assert kind == "apo_zero", kind
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
