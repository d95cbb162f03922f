"""Which weights move: an adapter (`lora`), an adapter on a base held in 4 bits (`qlora`), or all of them (`full`).

Every method of `methods/` asks here how the base is loaded and what is put on it. LoRA: Hu et al., 2021,
arXiv:2106.09685; QLoRA: Dettmers et al., 2023, arXiv:2305.14314. `full` has no adapter to switch off: TRL then loads
the reference a second time, from the base's own directory, which nothing ever writes into.

bf16 and GPUs are wired, not tested; nor is QLoRA, which starts only where there is a GPU.
"""

from __future__ import annotations

from importlib import util
from typing import Any

from trainer.errors import TrainingUnavailable
from trainer.recipe import FULL, QLORA, Recipe


def check_tuning(recipe: Recipe, device: str) -> None:
    """Raises TrainingUnavailable, before a run begins, where its weights could not be held as it wants them."""
    if recipe.tuning != QLORA:
        return
    if device != "gpu":
        raise TrainingUnavailable(
            f"Recipe {recipe.name} holds the base in 4 bits, which needs a GPU, and there is none here. "
            "Use tuning lora (the recipe dpo-lora), or start the run on a machine with a GPU."
        )
    if util.find_spec("bitsandbytes") is None:
        raise TrainingUnavailable(
            f"Recipe {recipe.name} needs bitsandbytes, which is not installed. "
            "Install it with `pip install 'zephyr-loop[qlora]'`, then start the run again."
        )


def uses_bf16(recipe: Recipe, device: str) -> bool:
    """Whether weights and activations are bf16: as the recipe says, `auto` on a GPU."""
    return recipe.precision == "bf16" or (recipe.precision == "auto" and device == "gpu")


def model_init(recipe: Recipe, device: str) -> dict[str, Any]:
    """How the base is loaded: `model_init_kwargs` of TRL's configurations.

    Where every weight moves they stay fp32, computed with in bf16: in bf16 itself, small steps would be rounded away.
    """
    bf16 = uses_bf16(recipe, device)
    kwargs: dict[str, Any] = {"dtype": "bfloat16" if bf16 and recipe.tuning != FULL else "float32"}
    if recipe.tuning == QLORA:
        import torch
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    return kwargs


def adapter_config(recipe: Recipe) -> Any:
    """PEFT's configuration of a fresh adapter on all linear layers; None where every weight moves."""
    if recipe.tuning == FULL:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
