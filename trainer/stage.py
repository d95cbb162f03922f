"""One stage of a training: what `job.py` gives to a method, what it gets back, and the arguments all methods share.

Each file of `methods/` has one function for the job, `prepare(Setting) -> Stage`: it chooses the rows, makes TRL's
trainer, and says between which values the first loss must lie. Most recipes have one stage, `sft-then-dpo` has two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.progress import FirstLoss, Progress
from trainer.recipe import Recipe
from trainer.runs import Run
from trainer.tuning import model_init, uses_bf16


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method is given: the recipe of the stage, where its weights start, where its checkpoints and words go."""

    run: Run
    recipe: Recipe
    base_dir: Path
    tokenizer: Any
    output_dir: Path
    progress: Progress


@dataclass(frozen=True, slots=True)
class Stage:
    """What a method gives back: TRL's trainer, ready, on `rows` rows; `facts` is more for training.json.

    `first_loss` says, given the log of the first step, where its loss must lie; None: anywhere.
    """

    trainer: Any
    rows: int
    total_steps: int
    dropped_over_long: int
    first_loss: Callable[[Mapping[str, float]], FirstLoss | None]
    facts: Mapping[str, Any] = field(default_factory=dict)


def shared_arguments(setting: Setting, total_steps: int) -> dict[str, Any]:
    """The recipe in the words that all of TRL's configurations have, for one process of the run."""
    config, recipe = setting.run.config, setting.recipe
    per_process, micro = recipe.per_process_batch(config.num_processes), recipe.micro_batch(config.num_processes)
    on_gpu = config.device == "gpu"
    return {
        "output_dir": str(setting.output_dir),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_schedule,
        "warmup_steps": int(recipe.warmup_ratio * total_steps),
        "max_grad_norm": recipe.max_grad_norm,
        "max_steps": total_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_process // micro,
        "max_length": recipe.max_length,
        "train_sampling_strategy": "sequential",  # the rows are in order already, on any number of processes
        "model_init_kwargs": model_init(recipe, config.device),
        "bf16": uses_bf16(recipe, config.device),
        "use_cpu": not on_gpu,
        "activation_checkpointing": on_gpu,
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide a NaN that the step has taken in
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
    }
