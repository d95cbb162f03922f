"""The served form of the base: the same weights, rounded; made once, whole or not at all, again when damaged."""

from pathlib import Path

import numpy as np
import pytest
import tiny_model
from gguf import GGUFReader
from gguf.quants import dequantize

from trainer import served_model
from trainer.base_model import BaseModel
from trainer.errors import BaseModelMissing
from trainer.served_model import ensure_served


def test_it_holds_the_same_weights_and_words(tmp_path: Path) -> None:
    base = tiny_model.shared_tiny()
    before, after = GGUFReader(base.gguf), GGUFReader(ensure_served(base, tmp_path))
    assert {key for key in before.fields if not key.startswith("GGUF.")} <= set(after.fields)
    for key in ("tokenizer.ggml.tokens", "tokenizer.chat_template", "llama.rope.freq_base"):
        assert after.fields[key].contents() == before.fields[key].contents()
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (new.name, new.shape.tolist()) == (old.name, old.shape.tolist())
        assert new.tensor_type.name == ("Q8_0" if len(old.shape) > 1 else "F32")
        weights, rounded = (dequantize(tensor.data, tensor.tensor_type) for tensor in (old, new))
        assert np.abs(weights - rounded).max() <= np.abs(weights).max() / 127


def test_it_is_made_once_and_again_when_it_is_damaged(tmp_path: Path) -> None:
    base = tiny_model.shared_tiny()
    gguf = ensure_served(base, tmp_path)
    made = gguf.stat().st_mtime_ns
    assert ensure_served(base, tmp_path) == gguf
    assert gguf.stat().st_mtime_ns == made
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[:-100])
    assert ensure_served(base, tmp_path).read_bytes() == whole
    gguf.with_name(served_model.MANIFEST).unlink()
    assert ensure_served(base, tmp_path).read_bytes() == whole


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path) -> str:
        if path.name == served_model.FILE:
            raise OSError(28, "No space left on device")
        return "0" * 64

    monkeypatch.setattr(served_model, "sha256_of", full_disk)
    with pytest.raises(OSError, match="No space"):
        ensure_served(tiny_model.shared_tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_gguf_file_there_is_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMissing, match="no GGUF file"):
        ensure_served(BaseModel("directory-only", directory=tmp_path), tmp_path)
