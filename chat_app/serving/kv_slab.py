"""The keys and values of all rows of a batch, in one block of memory per layer.

A row takes the next free place when its prompt has been read; when it is done, the last row moves into its place. So
the rows always lie at the front and a forward reads a view of them: nothing is copied from step to step. The block
grows in big pieces. It is zeroed when it is made, for what a mask hides must still be finite.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache

BLOCK_TOKENS = 512


def cells(rows: int, tokens: int) -> int:
    """How many tokens' keys and values a slab for so many rows of that length holds in memory."""
    return _round_rows(rows) * _round_tokens(tokens)


def _round_rows(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def _round_tokens(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class KVSlab(Cache):  # type: ignore[misc]
    """What the model sees as its cache while rows are written."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows = 0
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []  # per layer; row × head × token × dimension
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None  # row and position of each new token
        self._longest = 0

    def place(self, prompt: DynamicCache) -> None:
        """A new last row, with what was read of its prompt."""
        tokens = prompt.get_seq_length()
        if not self._blocks:
            self._blocks = [(layer.keys[:0], layer.values[:0]) for layer in prompt.layers]
        self._reserve(self.rows + 1, tokens)
        for block, layer in zip(self._blocks, prompt.layers, strict=True):
            block[0][self.rows, :, :tokens] = layer.keys[0]
            block[1][self.rows, :, :tokens] = layer.values[0]
        self.rows += 1

    def place_copy(self, row: int, tokens: int) -> None:
        """A new last row that begins like `row`."""
        self._reserve(self.rows + 1, tokens)
        self._copy(row, self.rows, tokens)
        self.rows += 1

    def remove(self, row: int, tokens_of_last: int, *, wipe: bool = False) -> None:
        """Free the place of `row`: the last row moves there. `wipe` where it may hold numbers that are not finite."""
        if wipe:
            for block in self._blocks:
                block[0][row].zero_()
                block[1][row].zero_()
        self.rows -= 1
        if row != self.rows:
            self._copy(self.rows, row, tokens_of_last)

    def clear(self) -> None:
        """Forget all rows and give the memory back."""
        self.rows, self._blocks, self._at = 0, [], None

    def begin(self, positions: torch.Tensor, longest: int) -> None:
        """The next forward writes a token of each row, at these positions; the longest row is `longest` then."""
        self._reserve(self.rows, longest)
        self._at = (torch.arange(self.rows, device=positions.device), positions)
        self._longest = longest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a layer's new keys and values (rows × heads × 1 × dimensions); give out those of all tokens."""
        assert self._at is not None
        rows, positions = self._at
        keys, values = self._blocks[layer_idx]
        keys[rows, :, positions] = key_states[:, :, 0]
        values[rows, :, positions] = value_states[:, :, 0]
        return keys[: self.rows, :, : self._longest], values[: self.rows, :, : self._longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the interface of Cache
        """How many tokens came before this forward, in the longest row."""
        return self._longest - 1

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for block in self._blocks:
            for tensor in block:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def _reserve(self, rows: int, tokens: int) -> None:
        """Room for so many rows of so many tokens; what is there is copied only when the block grows."""
        there = self._blocks[0][0].shape
        if there[0] >= rows and there[2] >= tokens:
            return
        rows, tokens = max(_round_rows(rows), there[0]), max(_round_tokens(tokens), there[2])
        self._blocks = [(_grown(keys, rows, tokens), _grown(values, rows, tokens)) for keys, values in self._blocks]


def _grown(block: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    """The block in a larger one, the rest of it zero."""
    there, heads, length, dimensions = block.shape
    larger = block.new_zeros(rows, heads, tokens, dimensions)
    larger[:there, :, :length] = block
    return larger
