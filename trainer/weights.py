"""What a training leaves in its run directory: an adapter or a whole model, each in both forms where the base has both.

    adapter/ (PEFT) + adapter.gguf          model/ (Hugging Face directory) + model.gguf

Called by `job.py`, in its child. The GGUF forms are for llama.cpp: without the base as GGUF nothing could serve them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feedback_store.bounded import load_json
from feedback_store.durable import sync_tree, write_json
from trainer.gguf_adapter import write_gguf_adapter
from trainer.gguf_model import write_gguf_model
from trainer.runs import Run

ADAPTER, MODEL = "adapter", "model"


def save_weights(trainer: Any, directory: Path, base: str) -> None:
    """What was trained, into `directory`: the adapter in PEFT form, or every weight and the tokenizer.

    To be called in every process of a run: weights that are spread over several are gathered first.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        _save_adapter(trainer, model, directory, base)
    else:
        trainer.save_model(str(directory))
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.json of the run has it all
    if trainer.accelerator.is_main_process:
        sync_tree(directory)


def _save_adapter(trainer: Any, model: Any, directory: Path, base: str) -> None:
    accelerator = trainer.accelerator
    sharded = accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")
    whole = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # by all processes together
    if accelerator.is_main_process:
        model.save_pretrained(directory, selected_adapters=["default"], state_dict=whole)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the version gets a real one
        _make_portable(directory / "adapter_config.json", base)
        _widen(directory / "adapter_model.safetensors")


def write_gguf_form(run: Run, base_dir: Path) -> None:
    """adapter.gguf or model.gguf beside what was saved, where the base has a GGUF form."""
    gguf = run.config.base["gguf"]
    if gguf is None:
        return
    if (run.directory / ADAPTER).is_dir():
        write_gguf_adapter(run.directory / ADAPTER, base_dir, run.directory / "adapter.gguf")
    else:
        write_gguf_model(run.directory / MODEL, Path(gguf), run.directory / "model.gguf")


def _widen(path: Path) -> None:
    """Store an adapter in fp32: on a 4-bit base it is trained in bf16, which not every reader of the file knows."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    if any(tensor.element_size() < 4 for tensor in tensors.values()):
        save_file({name: tensor.float() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _make_portable(path: Path, base: str) -> None:
    """Name the base instead of a path on this machine, and order what PEFT keeps in sets."""
    values = load_json(path)
    write_json(path, {**values, "base_model_name_or_path": base, "target_modules": sorted(values["target_modules"])})
