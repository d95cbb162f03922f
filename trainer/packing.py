"""How pairs lie in rows: prompt + chosen + rejected of each pair behind one another, several pairs in a row.

The prompt stands once for both answers: `rejected` does not see `chosen`, and its positions start again after the
prompt, so each answer is read as if it stood behind the prompt alone. Pairs of one row do not see each other. Used by
`dpo_trainer.py` to learn and by `evaluate.py` to judge; `pair_attention.py` computes attention in such a row.

Nothing here is padded, and every choice is a function of the lengths alone: the same step is packed the same way each
time, which resuming needs. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PairLengths:
    """Tokens of one pair: prompt (at least one) and both answers."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """What the pair takes in a row."""
        return self.prompt + self.chosen + self.rejected


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The pairs of one row, in their order."""

    pairs: tuple[PairLengths, ...]

    @property
    def tokens(self) -> int:
        return sum(pair.tokens for pair in self.pairs)

    @property
    def starts(self) -> list[int]:
        """Where each pair begins."""
        starts, at = [], 0
        for pair in self.pairs:
            starts.append(at)
            at += pair.tokens
        return starts

    @property
    def positions(self) -> list[int]:
        """The position id of each token of the row."""
        found: list[int] = []
        for pair in self.pairs:
            end = pair.prompt + pair.chosen
            found += [*range(end), *range(pair.prompt, pair.prompt + pair.rejected)]
        return found

    @property
    def predicting(self) -> list[int]:
        """Where the token stands whose hidden state predicts each answer token; chosen, then rejected, pair by pair."""
        found: list[int] = []
        for start, pair in zip(self.starts, self.pairs, strict=True):
            last_of_prompt, end = start + pair.prompt - 1, start + pair.prompt + pair.chosen
            found += [*range(last_of_prompt, end - 1)] if pair.chosen else []
            found += [last_of_prompt, *range(end, end + pair.rejected - 1)] if pair.rejected else []
        return found

    def visible(self) -> Any:
        """The mask as a bool tensor [tokens, tokens]: entry [by, seen] says whether `by` may look at `seen`."""
        import torch

        pair, part = (torch.tensor(ids) for ids in self.parts)
        causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril()
        hidden = (part[:, None] == _REJECTED) & (part[None, :] == _CHOSEN)
        return causal & (pair[:, None] == pair[None, :]) & ~hidden

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """For each token: the number of its pair, and whether it is of the prompt (0), chosen (1) or rejected (2)."""
        pairs: list[int] = []
        parts: list[int] = []
        for number, pair in enumerate(self.pairs):
            pairs += [number] * pair.tokens
            parts += [_PROMPT] * pair.prompt + [_CHOSEN] * pair.chosen + [_REJECTED] * pair.rejected
        return pairs, parts


_PROMPT, _CHOSEN, _REJECTED = 0, 1, 2


def pair_layout(prompt: int, chosen: int, rejected: int) -> RowLayout:
    """A row with one pair of these lengths."""
    return RowLayout((PairLengths(prompt, chosen, rejected),))


def pack(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `tokens` in rows of at most `budget` tokens; a longer one has a row to itself.

    First fit, longest first; equal lengths keep their order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        row = next((number for number, left in enumerate(room) if tokens[index] <= left), None)
        if row is None:
            rows.append([index])
            room.append(budget - tokens[index])
        else:
            rows[row].append(index)
            room[row] -= tokens[index]
    return rows


def balanced(tokens: Sequence[int], batch_size: int, num_processes: int) -> list[int]:
    """An order of all indices in which each step holds the pairs it held, dealt out so that no process waits long.

    A step is `batch_size` indices in turn, its k-th share of `batch_size / num_processes` goes to process k. The
    longest pairs are dealt first, to the process with the fewest tokens so far. A short last step keeps its order.
    """
    share = batch_size // num_processes
    order: list[int] = []
    for start in range(0, len(tokens), batch_size):
        step = range(start, min(start + batch_size, len(tokens)))
        if len(step) < batch_size or num_processes == 1:
            order += step
            continue
        dealt: list[list[int]] = [[] for _ in range(num_processes)]
        for index in sorted(step, key=lambda i: (-tokens[i], i)):
            open_hands = [hand for hand in dealt if len(hand) < share]
            min(open_hands, key=lambda hand: sum(tokens[i] for i in hand)).append(index)
        order += [index for hand in dealt for index in sorted(hand)]
    return order
