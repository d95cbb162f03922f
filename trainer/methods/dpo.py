"""Direct Preference Optimization (Rafailov et al., 2023). The reference is the adapter switched off.

`choose_rows` says which pairs in which order, `make_trainer` takes the fast step of `dpo_trainer.py` where it is exact
for the model at hand and TRL's own where it is not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from feedback_store.records import Preference
from trainer.errors import NothingToTrainOn
from trainer.recipe import Recipe
from trainer.reference_cache import ReferenceCache, fingerprint
from trainer.runs import Run
from trainer.tokens import tokenise


def choose_rows(
    preferences: Sequence[Preference], recipe: Recipe, max_steps: int | None, seed: int, tokenizer: Any
) -> tuple[list[Preference], int]:
    """The rows to learn from, in the order they are seen, and how many were dropped for an over-long prompt.

    Own picks come before imported rows when the steps do not suffice for all; both are shuffled by `seed`.
    """
    shuffle = random.Random(seed)  # noqa: S311 - an order that can be made again, not a secret
    order = shuffle.sample(list(preferences), len(preferences))
    order.sort(key=lambda preference: preference.source != "pick")
    wanted = recipe.total_steps(len(order), max_steps) * recipe.batch_size
    chosen: list[Preference] = []
    dropped = 0
    for preference in order:
        if len(chosen) == wanted:
            break
        if len(tokenise(tokenizer, preference, recipe.max_length).prompt) >= recipe.max_length:
            dropped += 1
        else:
            chosen.append(preference)
    if not chosen:
        raise NothingToTrainOn(
            f"All {len(order)} prompts are longer than max_length {recipe.max_length} tokens. Raise max_length."
        )
    return shuffle.sample(chosen, len(chosen)), dropped


def make_trainer(
    recipe: Recipe,
    preferences: Sequence[Preference],
    *,
    base_dir: Path,
    tokenizer: Any,
    arguments: Any,
    references: Path,
    report: Callable[[int, int], None],
) -> Any:
    """The trainer of a LoRA adapter on `preferences`: the fast one, or TRL's with the reason in its log and `facts`.

    Each step holds the pairs it holds in the order given. What the reference thinks of pairs is kept under
    `references`; `report` gets how many are known, of how many, while they are computed.
    """
    from accelerate.logging import get_logger
    from peft import LoraConfig
    from transformers import AutoConfig

    from trainer.dpo_trainer import PairTrainer, StockTrainer, why_stock

    rows = [(tokenise(tokenizer, preference, recipe.max_length), preference.weight) for preference in preferences]
    common = {
        "model": str(base_dir),
        "args": arguments,
        "rows": rows,
        "processing_class": tokenizer,
        "peft_config": LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    }
    why = (
        why_stock(AutoConfig.from_pretrained(base_dir), arguments)
        if recipe.fast_step == "auto"
        else "the recipe says so"
    )
    if why is None:
        trainer = PairTrainer(tokens_per_batch=recipe.tokens_per_batch, **common)
        why = trainer.difference()
        if why is None:
            trainer.add_references(ReferenceCache(references, fingerprint(base_dir, trainer.precision)), report)
            return trainer
    get_logger(__name__).warning(f"The fast step is off ({why}): TRL's own is used.")
    return StockTrainer(why=why, **common)


def arguments(run: Run, recipe: Recipe, total_steps: int) -> Any:
    """The recipe in TRL's words, for one process of the run."""
    from trl import DPOConfig

    config = run.config
    per_process = recipe.per_process_batch(config.num_processes)
    micro = math.gcd(recipe.micro_batch_size, per_process)
    on_gpu = config.device == "gpu"
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    return DPOConfig(
        output_dir=str(run.directory / "checkpoints"),
        loss_type=["sigmoid", "sft"] if recipe.loss == "sigmoid_sft" else [recipe.loss],
        loss_weights=[1.0, recipe.sft_weight] if recipe.loss == "sigmoid_sft" else None,
        label_smoothing=recipe.label_smoothing,
        beta=recipe.beta,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_schedule,
        warmup_steps=int(recipe.warmup_ratio * total_steps),
        max_grad_norm=recipe.max_grad_norm,
        max_steps=total_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_process // micro,
        max_length=recipe.max_length,
        train_sampling_strategy="sequential",  # choose_rows made the order; it is the same on any number of processes
        model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32"},
        bf16=bf16,
        use_cpu=not on_gpu,
        activation_checkpointing=on_gpu,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a NaN that the step has taken in
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
