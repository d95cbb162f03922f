"""One adapter made of two says exactly what the second says on the base that the first was merged into."""

import json
from pathlib import Path

import pytest
import tiny_model

from trainer.errors import JobError
from trainer.two_stages import join_adapters, merge_into_base

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_the_joined_adapter_gives_the_logits_of_both_stages(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model.shared_directory()
    first = tiny_model.random_adapter(base, tmp_path / "first", seed=1)
    merge_into_base(base, first, tmp_path / "merged")
    second = tiny_model.random_adapter(tmp_path / "merged", tmp_path / "second", seed=2)
    join_adapters(first, second, tmp_path / "joined")
    config = json.loads((tmp_path / "joined" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)

    def logits(directory: Path, adapter: Path | None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        with torch.inference_mode():
            return model(input_ids=torch.tensor([[1, 300, 301, 302, 303, 304]])).logits

    joined = logits(base, tmp_path / "joined")
    torch.testing.assert_close(joined, logits(tmp_path / "merged", second), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(base, first), logits(tmp_path / "merged", None), atol=1e-4, rtol=1e-4)
    assert (joined - logits(base, first)).abs().max() > 0.1, "the second adapter must be heard"


def test_adapters_of_another_shape_are_not_joined(tmp_path: Path) -> None:
    base = tiny_model.shared_directory()
    first = tiny_model.random_adapter(base, tmp_path / "first")
    second = tiny_model.random_adapter(base, tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    with pytest.raises(JobError, match="cannot be joined"):
        join_adapters(first, second, tmp_path / "joined")
