"""Load a base: a local directory or hub id → weights and tokenizer, tried out before anything is served from them.

Refused with a sentence: too little memory, no chat template, an architecture the batch cannot write with, weights that
are not finite. Not covered: a model split over several devices, quantised checkpoints, code that comes with a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from chat_app.serving.batch import read, write
from chat_app.serving.engine import EngineStartFailed, NoRoom, VersionUnservable
from chat_app.serving.kv_slab import BLOCK_TOKENS, KVSlab

CACHE_SHARE = 0.5  # of the memory that is free once the base is loaded: for keys and values
HEADROOM = 1.1  # what loading needs, in parts of the weights
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base that works. `ends`: the tokens that end an answer; `cache_tokens`: room for keys and values."""

    model: Any
    tokenizer: Any
    ends: frozenset[int]
    context_tokens: int
    cache_tokens: int


def load_base(base_model: str, precision: str) -> LoadedBase:
    """Load a base onto the GPU, where there is one, or the CPU. `precision`: auto, fp32 or bf16.

    auto is bf16 on a GPU that computes it, else fp32. Raises EngineStartFailed, NoRoom, VersionUnservable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    dtype = torch.bfloat16 if bf16 else torch.float32
    _check_room(base_model, dtype, device)
    tokenizer, model = _load(base_model, dtype, device)
    if not tokenizer.chat_template:
        raise VersionUnservable(
            f"{base_model} has no chat template: it is no chat model, or its directory lacks chat_template.jinja"
        )
    _check_finite(model, base_model)
    if device.type == "cpu" and dtype == torch.float32:
        _lay_out_for_few_rows(model)
    token_bytes = _try_out(model, base_model)
    cache_tokens = int(free_bytes(device) * CACHE_SHARE / token_bytes) // BLOCK_TOKENS * BLOCK_TOKENS
    if cache_tokens < BLOCK_TOKENS:
        raise NoRoom(f"{base_model} is loaded, but no memory is left for {BLOCK_TOKENS} tokens of conversation")
    return LoadedBase(model, tokenizer, _ends(model, tokenizer), min(_context(model), cache_tokens), cache_tokens)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _load(base_model: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model; whatever can be wrong with them becomes one sentence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"device_map": device} if device.type == "cuda" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model)
        model = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype, attn_implementation="sdpa", **where)
    except torch.OutOfMemoryError as error:
        raise NoRoom(f"there is not enough memory on the GPU for {base_model}: {_first_line(error)}") from error
    except OSError as error:  # transformers' word for: no such directory, no such hub id, no connection
        raise EngineStartFailed(
            f"{base_model} is no directory with a model, and no hub gave one of that name: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise VersionUnservable(f"{base_model} cannot be loaded: {_first_line(error)}") from error
    return tokenizer, model.eval()


def _check_room(base_model: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a directory whose weights are larger than what is free. A hub id is not known before it is loaded."""
    from safetensors import safe_open

    values = 0
    for path in Path(base_model).glob("*.safetensors") if Path(base_model).is_dir() else ():
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    values += torch.Size(file.get_slice(key).get_shape()).numel()
        except Exception as error:
            raise EngineStartFailed(f"{path} is damaged: {_first_line(error)}") from error
    needed, free = int(values * dtype.itemsize * HEADROOM), free_bytes(device)
    if needed > free:
        raise NoRoom(f"{base_model} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on the {device.type}")


def _check_finite(model: Any, base_model: str) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise EngineStartFailed(f"{base_model} is damaged: {name} holds numbers that are not finite")


def _lay_out_for_few_rows(model: Any) -> None:
    """Store each linear layer's weight column by column: products with one to three rows are a third faster so."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _try_out(model: Any, base_model: str) -> int:
    """Write a token the way the batch does, beside another row, and compare it with reading all at once.

    Returns the bytes that keys and values of one token take. Raises VersionUnservable where the two are not alike:
    an architecture that keeps something else than keys and values, or counts positions in a way of its own.
    """
    tokens = [number * 7 % model.config.get_text_config().vocab_size for number in range(3, 15)]
    slab = KVSlab()
    caches = [DynamicCache(), DynamicCache()]
    try:
        whole = read(model, tokens, 0, DynamicCache())
        for cache, length in zip(caches, (4, len(tokens) - 1), strict=True):
            read(model, tokens[: length - 2], 0, cache)
            read(model, tokens[length - 2 : length], length - 2, cache)
            slab.place(cache)
        written = write(model, [tokens[0], tokens[-1]], [4, len(tokens) - 1], slab)
        token_bytes = sum(layer.keys[:, :, 0].nbytes + layer.values[:, :, 0].nbytes for layer in caches[0].layers)
    except Exception as error:
        raise VersionUnservable(f"{base_model} cannot be served by this engine: {_first_line(error)}") from error
    difference = (whole[0] - written[1]).abs().max() / whole.abs().max()
    if not difference <= TOLERANCE[model.dtype]:
        raise VersionUnservable(
            f"{base_model} cannot be served by this engine: its architecture ({model.config.model_type}) does not "
            f"write token by token what it reads at once (difference {float(difference):.2g} of the largest logit)"
        )
    return int(token_bytes)


def _context(model: Any) -> int:
    """How many tokens it was made for; a window in which it sees only the last ones is a limit too."""
    config = model.config.get_text_config()
    limits = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    return min(int(limit) for limit in limits if limit)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    ends: set[int] = set()
    for said in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends.update(said if isinstance(said, list) else [] if said is None else [said])
    return frozenset(ends)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
