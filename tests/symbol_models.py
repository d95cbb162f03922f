"""An oracle for mixed-up versions: a tiny Llama of which each version says one symbol only, whatever it is asked.

The base says "z" for ever, the adapter of a symbol that symbol: one foreign character in an answer is a mistake of the
engine. Both forms of each: GGUF, and Hugging Face directory with PEFT adapter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from tiny_model import LAYERS, build_tiny_gguf, random_weights, shared_tiny

from trainer.base_model import BaseModel, ensure_base
from trainer.gguf_adapter import write_gguf_adapter

BASE_SYMBOL = "z"
SYMBOLS = "abcdefgh"
ALWAYS_ON = 0  # a dimension that is the same for every token, and so an activation that is always on
FIRST_DIRECTION = 8  # each symbol has a dimension of its own, from here on
LAST = f"blk.{LAYERS - 1}"


def symbol_base(directory: Path) -> BaseModel:
    """The base under `directory`, in both forms."""
    gguf = build_tiny_gguf(directory / "symbols.gguf", weights=_weights(_token_ids()))
    return BaseModel("symbols", gguf, ensure_base(BaseModel("symbols", gguf), directory / "models"))


def symbol_adapter(base: BaseModel, symbol: str, out: Path) -> Path:
    """The version that says `symbol`: the PEFT adapter in `out`, its GGUF form in `out/adapter.gguf`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert base.directory is not None
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if f"layers.{LAYERS - 1}.mlp.down_proj.lora_" in name:
            torch.nn.init.zeros_(parameter)
            if "lora_A" in name:
                parameter.data[0, ALWAYS_ON] = 1
            else:
                parameter.data[_direction(symbol), 0] = 1000
    model.save_pretrained(out)
    write_gguf_adapter(out, base.directory, out / "adapter.gguf")
    return out


def _direction(symbol: str) -> int:
    return FIRST_DIRECTION + (BASE_SYMBOL + SYMBOLS).index(symbol)


def _token_ids() -> dict[str, int]:
    """The token of each symbol, as the tiny model's tokenizer has it."""
    reader = GGUFReader(shared_tiny().gguf)
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    return {symbol: tokens.index(symbol) for symbol in BASE_SYMBOL + SYMBOLS}


def _weights(token_ids: dict[str, int]) -> dict[str, np.ndarray]:
    """Random weights, but one activation of the last layer is always on and writes the direction of a symbol."""
    weights = random_weights(0)
    head = 0.02 * weights["token_embd.weight"]
    for symbol, token in token_ids.items():
        head[token] = 0
        head[token, _direction(symbol)] = 4
    weights["output.weight"] = head
    weights["token_embd.weight"][:, ALWAYS_ON] = 3
    for layer in range(LAYERS):
        weights[f"blk.{layer}.attn_output.weight"][ALWAYS_ON] = 0
        weights[f"blk.{layer}.ffn_down.weight"][ALWAYS_ON] = 0
    for gate in (f"{LAST}.ffn_gate.weight", f"{LAST}.ffn_up.weight"):
        weights[gate][0] = 0
        weights[gate][0, ALWAYS_ON] = 4
    weights[f"{LAST}.ffn_down.weight"][:, 0] = 0
    weights[f"{LAST}.ffn_down.weight"][_direction(BASE_SYMBOL), 0] = 100
    return weights
