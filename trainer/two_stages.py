"""What lies between and behind the two stages of `sft-then-dpo`, so that its version is one adapter on the base.

    base + first adapter = merged base → the second stage starts there, and there is its reference
    first adapter + second adapter → one adapter on the base, which says exactly what the two say one after the other

A LoRA adds scale · B·A to a weight. Two of them add scale · [B1 B2]·[A1; A2]: one adapter of twice the rank with the
same scale, so twice the alpha. Where every weight moves nothing is merged: the second stage starts from the model of
the first. Called by `job.py`. Not covered: adapters of different scales or on different layers.
"""

from __future__ import annotations

from pathlib import Path

from feedback_store.bounded import load_json
from feedback_store.durable import new_directory, sync_tree, write_json
from trainer.errors import JobError


def merge_into_base(base_dir: Path, adapter_dir: Path, out: Path) -> None:
    """A Hugging Face directory with the adapter added into the weights of the base, fp32, and the base's tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    with new_directory(out) as directory:
        merged.save_pretrained(directory)
        AutoTokenizer.from_pretrained(base_dir).save_pretrained(directory)


def join_adapters(first: Path, second: Path, out: Path) -> None:
    """One adapter in PEFT form that does what `first` and then `second` on the merged base do."""
    import torch
    from safetensors.torch import load_file, save_file

    config, other = (load_json(path / "adapter_config.json") for path in (first, second))
    same = ("target_modules", "lora_alpha", "r", "use_rslora", "use_dora", "bias")
    if any(config.get(key) != other.get(key) for key in same):
        raise JobError(f"The adapters of the two stages differ in one of {', '.join(same)}: they cannot be joined.")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    joined = {
        name: torch.cat([one[name], two[name]], dim=0 if ".lora_A." in name else 1).contiguous() for name in sorted(one)
    }
    out.mkdir()
    save_file(joined, out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(out / "adapter_config.json", {**config, "r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]})
    sync_tree(out)
