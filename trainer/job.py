"""CHILD: one run directory in, one adapter (or whole model) out. How it learns is the recipe's method (`methods/`).

Started by `launch.py`; by hand: `accelerate launch --config_file trainer/recipes/accelerate/cpu_single.yaml
-m trainer.job RUN_DIR`. Reads config.json and the snapshot's Parquet, never the database or the environment.

It stops with a sentence in failure.json when the number of processes is not the one asked for, when the first loss of
a stage is not what its method makes it (with DPO ln 2: else the reference is wrong), and at the first loss or gradient
norm that is not finite. training.json, written last, means: the weights are complete.

Not covered: resuming, weights per pair, sharing the prompt. bf16 and GPUs are wired, not tested.
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from feedback_store.errors import StoreError
from trainer.base_model import BaseModel, ensure_base
from trainer.errors import JobError, TrainerError, WrongProcessCount
from trainer.methods import continued_pretraining, dpo, kto, sft
from trainer.progress import Progress, watch
from trainer.recipe import CONTINUED_PRETRAINING, DPO, KTO, SFT, Recipe, from_mapping
from trainer.runs import Run, RunConfig
from trainer.stage import Setting
from trainer.two_stages import join_adapters, merge_into_base
from trainer.weights import ADAPTER, MODEL, save_weights, write_gguf_form

METHODS = {
    DPO: dpo.prepare,
    SFT: sft.prepare,
    KTO: kto.prepare,
    CONTINUED_PRETRAINING: continued_pretraining.prepare,
}


def train(run: Run) -> None:
    """Train what `run` asks for. Raises JobError with the sentence that becomes the run's error."""
    from accelerate import PartialState
    from transformers import AutoTokenizer

    config = run.config
    recipe = from_mapping(config.recipe_name, config.recipe)
    process = PartialState(cpu=config.device == "cpu")
    _check_processes(process, config)
    progress = Progress(run, is_main=process.is_main_process)
    progress.write("loading")
    with process.main_process_first():
        base_dir = ensure_base(BaseModel.from_dict(config.base), Path(config.models_dir))
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    weights = run.directory / (MODEL if recipe.is_full else ADAPTER)
    stages = recipe.stages()
    facts: list[dict[str, Any]] = []
    begin = base_dir
    for number, stage_recipe in enumerate(stages, start=1):
        is_last = number == len(stages)
        saved = weights if len(stages) == 1 else run.directory / "checkpoints" / f"stage{number}"
        facts.append(
            _train_stage(Setting(run, stage_recipe, begin, tokenizer), progress, facts, stages[number:], saved)
        )
        if not is_last:
            begin = _start_of_next(process, recipe, base_dir, saved)
        elif number > 1 and process.is_main_process:
            _finish_stages(recipe, run.directory / "checkpoints", weights)
    if process.is_main_process:
        write_gguf_form(run, base_dir)
        write_json(run.directory / "training.json", {**_sums(facts), "base_directory": str(base_dir)})
    process.wait_for_everyone()
    process.destroy_process_group()


def _train_stage(
    setting: Setting, progress: Progress, done: list[dict[str, Any]], later: list[Recipe], saved: Path
) -> dict[str, Any]:
    """Train one stage and save its weights in `saved`; returns what training.json says of it.

    `done` are the earlier stages, `later` the recipes of those to come, whose steps are a plan until they begin.
    """
    config, recipe = setting.run.config, setting.recipe
    progress.write("loading")
    stage = METHODS[recipe.method](setting)
    before = _sums(done)
    to_come = sum(other.total_steps(stage.rows, config.max_steps) for other in later)
    progress.start("training", total_steps=before["steps"] + stage.total_steps + to_come)
    trainer = stage.trainer
    callback = watch(stage, recipe.batch_size, progress, steps_before=before["steps"], rows_before=before["pairs"])
    trainer.add_callback(callback)
    trainer.train()
    _check_all_seen(trainer, stage.total_steps)
    save_weights(trainer, saved, str(config.base["name"]))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "method": recipe.method,
        "steps": stage.total_steps,
        "pairs": stage.rows,
        "dropped_over_long": stage.dropped_over_long,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _start_of_next(process: Any, recipe: Recipe, base_dir: Path, saved: Path) -> Path:
    """The directory the next stage starts from: the base with the adapter of this one merged, or its whole model."""
    gc.collect()  # the trainer of this stage and its model are not needed any more
    merged = saved if recipe.is_full else saved.with_name("merged")
    if process.is_main_process and not recipe.is_full:
        merge_into_base(base_dir, saved, merged)
    process.wait_for_everyone()
    return merged


def _finish_stages(recipe: Recipe, checkpoints: Path, weights: Path) -> None:
    """The weights of all stages as those of one; what lay between the stages goes."""
    if recipe.is_full:
        (checkpoints / "stage2").replace(weights)
    else:
        join_adapters(checkpoints / "stage1", checkpoints / "stage2", weights)
    for left in ("stage1", "stage2", "merged"):
        shutil.rmtree(checkpoints / left, ignore_errors=True)


def _sums(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """training.json from the facts of the stages: the loss is that of the last one."""
    sums: dict[str, Any] = {key: sum(stage[key] for stage in facts) for key in ("steps", "pairs")}
    if not facts:
        return sums
    last = facts[-1]
    kept = {key: last[key] for key in ("dropped_over_long", "first_loss", "last_loss")}
    return {**sums, **kept, "stages": facts}


def _check_processes(process: Any, config: RunConfig) -> None:
    if process.num_processes != config.num_processes:
        raise WrongProcessCount(
            f"{config.num_processes} processes were asked for, {process.num_processes} started. "
            "Check the accelerate configuration: a wrong distributed_type starts one process without a word."
        )
    if config.device == "gpu" and process.device.type == "cpu":
        raise JobError("This run was started for a GPU but torch sees none. Check the driver and the build of torch.")


def _check_all_seen(trainer: Any, total_steps: int) -> None:
    if trainer.state.global_step != total_steps:
        raise JobError(f"Training stopped at step {trainer.state.global_step} of {total_steps} without an error.")


def main() -> None:
    """`python -m trainer.job RUN_DIR`, once in each process of the launch."""
    run = Run(Path(sys.argv[1]))
    try:
        train(run)
    except (TrainerError, StoreError) as error:
        write_json(run.directory / "failure.json", {"stage": "training", "reason": str(error)})
        raise SystemExit(f"Stopped: {error}") from error


if __name__ == "__main__":
    main()
