"""Whether every weight of a version is a finite number, in both forms: safetensors and GGUF (llama.cpp).

Asked by `versions.py`. A hash says that a file is the one that was published, not that it is fit to be served. Needs
neither torch nor safetensors. Not covered: quantised tensors, which hold no plain floats (of a whole model as GGUF; its
other form is looked at, and it was made from that).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLOATS: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_BFLOAT16, _BFLOAT16_EXPONENT = "BF16", 0x7F80


def non_finite_tensor(path: Path) -> str | None:
    """The name of a tensor that holds NaN or infinity, None where there is none. Raises ValueError: not such a file."""
    found = _safetensors(path) if path.suffix == ".safetensors" else _gguf(path)
    return next((name for name, tensor in found if not _is_finite(tensor)), None)


def _is_finite(tensor: NDArray[Any]) -> bool:
    if tensor.dtype == np.uint16:  # bfloat16, which numpy does not know: all bits of the exponent set
        return bool(np.all(tensor & _BFLOAT16_EXPONENT != _BFLOAT16_EXPONENT))
    return bool(np.isfinite(tensor).all())


def _safetensors(path: Path) -> list[tuple[str, NDArray[Any]]]:
    """Name and values of every tensor of floats: eight bytes of length, a JSON header, then the values."""
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        kind: np.dtype[Any] | None = np.dtype("<u2") if entry["dtype"] == _BFLOAT16 else _FLOATS.get(entry["dtype"])
        if kind is not None:
            begin, end = entry["data_offsets"]
            found.append((name, np.frombuffer(content[start + begin : start + end], kind)))
    return found


def _gguf(path: Path) -> list[tuple[str, NDArray[Any]]]:
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return [(tensor.name, tensor.data) for tensor in tensors if tensor.data.dtype.kind == "f"]
