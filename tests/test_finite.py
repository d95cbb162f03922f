"""Every weight finite, in both forms and every kind of float."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.finite import non_finite_tensor


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_safetensors(tmp_path: Path, kind: torch.dtype, bad: float | None) -> None:
    values = torch.linspace(-3, 60000, 24).reshape(4, 6).to(kind)
    if bad is not None:
        values[3, 5] = bad
    path = tmp_path / "adapter_model.safetensors"
    save_file({"good": torch.ones(3, dtype=kind), "looked.at": values, "whole": torch.arange(4)}, path)
    assert non_finite_tensor(path) == (None if bad is None else "looked.at")


def test_a_cut_file_is_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"one": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"Unterminated|delimiter|Expecting"):
        non_finite_tensor(path)
