"""A PEFT LoRA adapter as a GGUF file that llama.cpp serves: the same tensors under llama.cpp's names.

The last step of `job.py`. By hand: `python -m trainer.gguf_adapter ADAPTER_DIR BASE_DIR OUT.gguf`.
llama.cpp applies `lora_alpha / rank`; the rows of `lora_B` of q and k are permuted head by head, as the Llama
family's weights are in GGUF. Needs neither torch nor transformers.

Not covered: other architectures than Llama, rsLoRA, DoRA, per-layer ranks: refused, not written wrongly.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback_store.bounded import load_json
from trainer.errors import JobError

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KEY = re.compile(r"^base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight$")
_REFUSED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


def write_gguf_adapter(adapter_dir: Path, base_dir: Path, out: Path) -> None:
    """Write `out` from the PEFT adapter in `adapter_dir`. Raises JobError on what it cannot express."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    adapter = load_json(adapter_dir / "adapter_config.json")
    base = load_json(base_dir / "config.json")
    _check(adapter, base)
    heads = int(base["num_attention_heads"])
    kv_heads = int(base.get("num_key_value_heads") or heads)
    writer = GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(adapter["lora_alpha"]))
    for key, tensor in sorted(load_file(adapter_dir / "adapter_model.safetensors").items()):
        layer, module, half = _parse(key)
        values = tensor.astype(np.float32)
        if half == "B" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            values = permute_rows(values, heads if module == "self_attn.q_proj" else kv_heads)
        writer.add_tensor(f"blk.{layer}.{LAYER_NAMES[module]}.weight.lora_{half.lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permute_rows(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows (out × in) from Hugging Face's rotary layout, halves, to llama.cpp's, interleaved, within each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _check(adapter: dict[str, Any], base: dict[str, Any]) -> None:
    if base.get("model_type") != "llama":
        raise JobError(f"The base is a {base.get('model_type')!r} model; only llama adapters can be written as GGUF.")
    for key in _REFUSED:
        if adapter.get(key):
            raise JobError(f"The adapter uses {key} = {adapter[key]!r}, which a GGUF adapter cannot express.")


def _parse(key: str) -> tuple[int, str, str]:
    match = _KEY.match(key)
    if match is None or match[2] not in LAYER_NAMES:
        raise JobError(f"The adapter holds {key!r}, which has no place in a GGUF adapter of a Llama model.")
    return int(match[1]), match[2], match[3]


if __name__ == "__main__":
    write_gguf_adapter(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
