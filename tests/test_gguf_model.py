"""A whole model as GGUF: the base's own weights come back as they were, and llama.cpp says what transformers says."""

from pathlib import Path

import numpy as np
import pytest
import tiny_model
from gguf import GGUFReader
from gguf.quants import dequantize

from trainer.errors import JobError
from trainer.gguf_model import hugging_face_name, write_gguf_model


def perturbed(out: Path) -> Path:
    """The tiny base with every weight moved a little, as a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model.shared_directory(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(out, max_shard_size="500KB")
    AutoTokenizer.from_pretrained(tiny_model.shared_directory()).save_pretrained(out)
    return out


def test_what_was_not_trained_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    base = tiny_model.shared_tiny()
    assert base.gguf is not None
    write_gguf_model(tiny_model.shared_directory(), base.gguf, tmp_path / "same.gguf", form="F32")
    write_gguf_model(tiny_model.shared_directory(), base.gguf, tmp_path / "rounded.gguf")
    before, same, rounded = (
        GGUFReader(path) for path in (base.gguf, tmp_path / "same.gguf", tmp_path / "rounded.gguf")
    )
    assert {key for key in before.fields if not key.startswith("GGUF.")} <= set(same.fields)
    for old, new, other in zip(before.tensors, same.tensors, rounded.tensors, strict=True):
        assert old.name == new.name == other.name
        assert np.array_equal(old.data, new.data), old.name
        assert other.tensor_type.name == ("Q8_0" if len(old.shape) > 1 else "F32")
        difference = np.abs(dequantize(other.data, other.tensor_type) - dequantize(old.data, old.tensor_type)).max()
        assert difference <= np.abs(old.data).max() / 127


def test_llama_cpp_says_what_transformers_says(tmp_path: Path) -> None:
    base = tiny_model.shared_tiny()
    assert base.gguf is not None
    model = perturbed(tmp_path / "model")
    assert len(list(model.glob("*.safetensors"))) > 1
    write_gguf_model(model, base.gguf, tmp_path / "model.gguf", form="F32")
    prompts = [[1, 300, 301, 302], [1, 400, 500, 600, 700]]
    expected = tiny_model.transformers_greedy(model, None, prompts, 12)
    assert tiny_model.llama_greedy(tmp_path / "model.gguf", None, prompts, 12) == expected
    assert expected != tiny_model.transformers_greedy(tiny_model.shared_directory(), None, prompts, 12)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base = tiny_model.shared_tiny()
    assert base.gguf is not None
    with pytest.raises(JobError, match="not known of a Llama model"):
        hugging_face_name("blk.0.attn_norm_2.weight")
    with pytest.raises(JobError, match=r"has no model\."):
        write_gguf_model(tmp_path, base.gguf, tmp_path / "out.gguf")
    model = perturbed(tmp_path / "model")
    save_file({"model.extra.weight": torch.zeros(2)}, model / "extra.safetensors")
    with pytest.raises(JobError, match=r"holds model\.extra\.weight, which has no place"):
        write_gguf_model(model, base.gguf, tmp_path / "out.gguf")
