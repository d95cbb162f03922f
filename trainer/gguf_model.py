"""A whole trained model as one GGUF file that llama.cpp serves: the base's own file with every tensor put back.

The last step of `job.py` where every weight moved. By hand: `python -m trainer.gguf_model MODEL_DIR BASE.gguf OUT`.
Metadata and tokenizer are those of the base; matrices are Q8_0, the form the embedded base is served in, vectors F32;
the rows of q and k are permuted head by head, as the Llama family's are in GGUF. Needs safetensors and torch.

Not covered: other architectures than Llama; a tensor that has no place is refused, not left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import JobError
from trainer.gguf_adapter import LAYER_NAMES, permute_rows
from trainer.served_model import copy_metadata, metadata

FORM = "Q8_0"
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{gguf: ours for ours, gguf in LAYER_NAMES.items()},
}
_BLOCK = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")
_COMPUTED = ("rope_freqs.weight",)  # tables that the base's file holds and no training changes


def write_gguf_model(model_dir: Path, base_gguf: Path, out: Path, form: str = FORM) -> None:
    """Write `out` from the Hugging Face directory. Raises JobError on what has no place in the base's file."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

    reader = GGUFReader(base_gguf)
    architecture = str(metadata(reader, "general.architecture"))
    if architecture != "llama":
        raise JobError(f"The base is a {architecture!r} model; only llama models can be written as GGUF.")
    weights = _Weights(model_dir)
    heads = int(metadata(reader, "llama.attention.head_count"))
    kv_heads = int(metadata(reader, "llama.attention.head_count_kv"))
    writer = GGUFWriter(out, architecture)
    copy_metadata(reader, writer)
    writer.add_file_type(LlamaFileType["ALL_F32" if form == "F32" else f"MOSTLY_{form}"])
    matrix_type = GGMLQuantizationType[form]
    for tensor in reader.tensors:
        if tensor.name in _COMPUTED:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = weights.take(hugging_face_name(tensor.name))
        if list(values.shape) != [int(size) for size in reversed(tensor.shape)]:
            raise JobError(f"{tensor.name} is {list(values.shape)} in {model_dir}, not as in the base's GGUF file.")
        if ".attn_q." in tensor.name:
            values = permute_rows(values, heads)
        elif ".attn_k." in tensor.name:
            values = permute_rows(values, kv_heads)
        kind = matrix_type if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    if left := weights.left():
        raise JobError(f"{model_dir} holds {left[0]}, which has no place in the base's GGUF file.")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hugging_face_name(name: str) -> str:
    """The name a tensor of a GGUF file has in a Hugging Face directory. Raises JobError."""
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK.match(name)
    if match is None or match[2] not in _INNER:
        raise JobError(f"The base's GGUF file holds {name!r}, which is not known of a Llama model.")
    return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"


class _Weights:
    """The tensors of a Hugging Face directory, one file or several, each read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = dict(self._names())

    def _names(self) -> Iterator[tuple[str, Path]]:
        from safetensors import safe_open

        for path in sorted(self._directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, path

    def take(self, name: str) -> NDArray[Any]:
        from safetensors import safe_open

        path = self._files.pop(name, None)
        if path is None:
            raise JobError(f"{self._directory} has no {name}, which the base's GGUF file has.")
        with safe_open(path, framework="pt") as file:
            values: NDArray[Any] = file.get_tensor(name).float().numpy()
        return values

    def left(self) -> list[str]:
        return sorted(self._files)


if __name__ == "__main__":
    write_gguf_model(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
