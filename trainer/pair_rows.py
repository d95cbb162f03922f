"""Pairs of token ids as tensors: the batch of a step, and the packed rows (`packing.py`) that are cut out of it.

A batch is flat, without padding: `input_ids` [all tokens] holds prompt, chosen and rejected of each pair in turn,
`lengths` [pairs, 3] says how many of each, `weight` [pairs] and `reference` [pairs, 2] belong to the pair. A pair of
weight 0 fills up a short last step: it is computed with and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.packing import PairLengths, RowLayout
from trainer.tokens import PairTokens

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "weight")
WeightedPair = tuple[PairTokens, float]


@dataclass(slots=True)
class Row:
    """A packed row on its device: what a model reads, and what `pair_attention` needs to know about it.

    input_ids and position_ids are [1, tokens]; predicting and targets are [answer tokens].
    """

    layout: RowLayout
    input_ids: Tensor
    position_ids: Tensor
    predicting: Tensor
    targets: Tensor
    _block_mask: Any = None

    def block_mask(self) -> Any:
        """FlexAttention's mask of the whole row, made once for all layers."""
        if self._block_mask is None:
            from torch.nn.attention.flex_attention import create_block_mask

            tokens, device = self.layout.tokens, self.input_ids.device
            self._block_mask = create_block_mask(self.sees(), None, None, tokens, tokens, device=str(device))
        return self._block_mask

    def sees(self) -> Any:
        """The same as `RowLayout.visible`, as a function of indices."""
        pairs, parts = (torch.tensor(ids, device=self.input_ids.device) for ids in self.layout.parts)

        def visible(_batch: Tensor, _head: Tensor, by: Tensor, seen: Tensor) -> Tensor:
            hidden = (parts[by] == 2) & (parts[seen] == 1)
            return (by >= seen) & (pairs[by] == pairs[seen]) & ~hidden

        return visible


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch of these rows of the data set. Without references they are 0."""
    parts = [example[column] for example in examples for column in COLUMNS[:3]]
    references = [[example.get(f"ref_{side}_logps", 0.0) for side in ("chosen", "rejected")] for example in examples]
    return {
        "input_ids": torch.tensor([token for part in parts for token in part]),
        "lengths": torch.tensor([len(part) for part in parts]).view(-1, 3),
        "weight": torch.tensor([example["weight"] for example in examples], dtype=torch.float32),
        "reference": torch.tensor(references, dtype=torch.float32),
    }


def row_of(batch: dict[str, Tensor], indices: Sequence[int]) -> Row:
    """The pairs of `batch` at `indices` as one row."""
    lengths = [PairLengths(*one) for one in batch["lengths"].tolist()]
    pieces = batch["input_ids"].split([pair.tokens for pair in lengths])
    layout = RowLayout(tuple(lengths[index] for index in indices))
    device = batch["input_ids"].device
    ids = [pieces[index] for index in indices]
    return Row(
        layout=layout,
        input_ids=torch.cat(ids)[None],
        position_ids=torch.tensor([layout.positions], device=device),
        predicting=torch.tensor(layout.predicting, dtype=torch.long, device=device),
        targets=torch.cat([one[pair.prompt :] for one, pair in zip(ids, layout.pairs, strict=True)]),
    )


def columns(tokens: PairTokens, weight: float = 1.0) -> dict[str, Any]:
    """A pair as a row of the data set."""
    return dict(zip(COLUMNS, (tokens.prompt, tokens.chosen, tokens.rejected, weight), strict=True))


def tokens_of(example: dict[str, Any]) -> PairTokens:
    """The inverse of `columns`."""
    return PairTokens(*(list(example[column]) for column in COLUMNS[:3]))


def by_answer(each: Tensor, row: Row) -> Tensor:
    """Values of answer tokens summed by answer, [pairs, 2]: chosen, rejected."""
    lengths = [length for pair in row.layout.pairs for length in (pair.chosen, pair.rejected)]
    return torch.stack([part.sum() for part in each.split(lengths)]).view(-1, 2)
