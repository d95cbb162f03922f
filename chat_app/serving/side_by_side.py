"""LoRA versions side by side on one base: each row of a batch goes through the adapter of its own version.

In each adapted layer the matrices of all adapters stand beside each other; a row's mask lets only the ranks of its own
adapter through, and multiplies the others by zero, which is exact because every adapter is finite. One forward serves
any mixture, the base among it, at the price of two thin matrix products a layer.

Why not PEFT's own `adapter_names`: it hooks and unhooks every module at each forward, leaves the hooks behind when a
forward fails, and loads an adapter module by module. Here adapters are files that are checked first and then put in
place between two forwards. The numbers are PEFT's (tests compare them).

Not covered, refused: DoRA, adapters with biases or whole saved modules, adapted embeddings, layers that are not linear.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chat_app.serving.engine import EngineStartFailed, VersionUnservable
from feedback_store.bounded import load_json

_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: for each module its two matrices, rank × in and out × rank, the second one already scaled."""

    rank: int
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_adapter(directory: Path, version: str, model: torch.nn.Module) -> Adapter:
    """The PEFT adapter in `directory`, found to fit `model` and to be finite.

    Raises VersionUnservable for one that does not fit, EngineStartFailed for one that is damaged.
    """
    from safetensors.torch import load_file

    try:
        config = load_json(directory / "adapter_config.json")
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise EngineStartFailed(f"the adapter of {version} in {directory} cannot be read: {error}") from error
    except Exception as error:  # safetensors has an error class of its own, which is a plain Exception
        if type(error).__name__ != "SafetensorError":
            raise
        raise EngineStartFailed(f"the adapter of {version} in {directory} is damaged: {error}") from error
    _check_kind(config, version)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise VersionUnservable(f"the adapter of {version} holds {key!r}: only LoRA on linear layers can be served")
        if not tensor.isfinite().all():
            raise EngineStartFailed(f"the adapter of {version} is damaged: {key} holds numbers that are not finite")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise EngineStartFailed(f"the adapter of {version} in {directory} is empty")
    matrices = {name: _fitting(name, found, config, version, model) for name, found in halves.items()}
    return Adapter(max(down.shape[0] for down, _ in matrices.values()), matrices)


def _check_kind(config: dict[str, Any], version: str) -> None:
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise VersionUnservable(
            f"the adapter of {version} is of the kind {config.get('peft_type')} with bias {config.get('bias')!r}: "
            "only LoRA without biases can be served"
        )
    for key in _REFUSED:
        if config.get(key):
            raise VersionUnservable(f"the adapter of {version} uses {key}: only plain LoRA can be served")


def _fitting(
    name: str, halves: dict[str, torch.Tensor], config: dict[str, Any], version: str, model: torch.nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise VersionUnservable(f"the adapter of {version} is for another base: this one has no {name}") from error
    if isinstance(module, AdaptedLinear):
        module = module.base
    if not isinstance(module, torch.nn.Linear):
        raise VersionUnservable(f"the adapter of {version} changes {name}, which is no linear layer")
    if halves.keys() != {"A", "B"}:
        raise EngineStartFailed(f"the adapter of {version} is damaged: {name} has only half of its matrices")
    down, up = halves["A"], halves["B"]
    wanted, found = (module.in_features, module.out_features), (down.shape[-1], up.shape[0])
    if wanted != found or down.shape[0] != up.shape[1]:
        raise VersionUnservable(
            f"the adapter of {version} is for another base: its {name} is {found[0]} → {found[1]}, "
            f"the base has {wanted[0]} → {wanted[1]}"
        )
    return down, up.float() * _scale(name, down.shape[0], config)


def _scale(name: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / rank, or alpha / √rank for rank-stabilised LoRA; a pattern may give some layers an alpha of their own."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = float(next(own, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class AdaptersSideBySide:
    """All adapters on a model, and which rows of the next forward go through which."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, AdaptedLinear] = {}
        self._spans: dict[str, slice] = {}  # which of the ranks are an adapter's
        self._route = Route(None, None)

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter in place. Never while a forward runs."""
        for module_name in adapter.matrices.keys() - self._layers.keys():
            parent_name, _, own_name = module_name.rpartition(".")
            layer = AdaptedLinear(self._model.get_submodule(module_name), self._route)
            setattr(self._model.get_submodule(parent_name), own_name, layer)
            self._layers[module_name] = layer
        self._arrange(self._adapters | {name: adapter})

    def remove(self, name: str) -> None:
        """Take an adapter away. Never while a forward runs, nor while a row still needs it."""
        self._arrange({other: adapter for other, adapter in self._adapters.items() if other != name})

    def route(self, names: list[str | None]) -> None:
        """Row by row, the adapter that the next forwards go through; None: the base."""
        first = names[0]
        if names.count(first) == len(names):
            self._route.span, self._route.mask = (None if first is None else self._spans[first]), None
            return
        ranks = sum(adapter.rank for adapter in self._adapters.values())
        mask = next(self._model.parameters()).new_zeros(len(names), 1, ranks)
        for row, name in enumerate(names):
            if name is not None:
                mask[row, :, self._spans[name]] = 1
        self._route.span, self._route.mask = slice(0, ranks), mask

    def _arrange(self, adapters: dict[str, Adapter]) -> None:
        spans, ranks = {}, 0
        for name, adapter in adapters.items():
            spans[name] = slice(ranks, ranks + adapter.rank)
            ranks += adapter.rank
        for module_name, layer in self._layers.items():
            layer.hold(ranks, [(spans[name], adapter.matrices.get(module_name)) for name, adapter in adapters.items()])
        self._adapters, self._spans = adapters, spans


@dataclass(slots=True)
class Route:
    """What every adapted layer reads at each forward. No span: the base alone; a mask: row by row."""

    span: slice | None
    mask: torch.Tensor | None


class AdaptedLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with the matrices of all adapters beside each other, ranks × in and ranks × out."""

    def __init__(self, base: torch.nn.Linear, route: Route) -> None:
        super().__init__()
        self.base = base
        self._route = route
        self._down = self._up = base.weight.new_zeros(0, 0)

    def hold(self, ranks: int, parts: list[tuple[slice, tuple[torch.Tensor, torch.Tensor] | None]]) -> None:
        """Take these matrices instead of the present ones; where an adapter has none for this layer stand zeros."""
        down = self.base.weight.new_zeros(ranks, self.base.in_features)
        up = self.base.weight.new_zeros(ranks, self.base.out_features)
        for span, matrices in parts:
            if matrices is not None:
                own = slice(span.start, span.start + matrices[0].shape[0])
                down[own], up[own] = matrices[0].to(down), matrices[1].t().to(up)
        self._down, self._up = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base gives, and what each row's adapter adds."""
        result = self.base(x)
        span, mask = self._route.span, self._route.mask
        if span is None:
            return result
        hidden = torch.nn.functional.linear(x, self._down[span])
        return result + (hidden if mask is None else hidden * mask) @ self._up[span]
