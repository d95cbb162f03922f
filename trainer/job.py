"""CHILD: one run directory in, one adapter (or whole model) out. How it learns is the recipe's method (`methods/`).

Started by `launch.py`; by hand: `accelerate launch --config_file trainer/recipes/accelerate/cpu_single.yaml
-m trainer.job RUN_DIR`. Reads config.json and the snapshot's Parquet, never the database or the environment.

It stops with a sentence in failure.json when accelerate did not start the processes or the strategy asked for, when
the first loss of a stage is not what its method makes it (with DPO ln 2: else the reference is wrong), and at the first
loss or gradient norm that is not finite. training.json, written last, means: the weights are complete.

One that was killed and is started again goes on from its last checkpoint (`checkpoints.py`), and has nothing left to do
where training.json is there: it ends well at once. bf16 and GPUs are wired, not tested.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, write_json
from feedback_store.errors import StoreError
from feedback_store.private_files import new_files_private
from trainer.base_model import BaseModel, ensure_base
from trainer.checkpoints import FOLDER, remove_checkpoints, train_from_last
from trainer.command import Launch
from trainer.disk import disk_full, is_disk_full
from trainer.errors import JobError, TrainerError, WrongProcessCount, WrongStrategy
from trainer.memory import is_out_of_memory, out_of_memory, training_advice
from trainer.methods import continued_pretraining, dpo, kto, sft
from trainer.progress import Progress, watch
from trainer.recipe import CONTINUED_PRETRAINING, DPO, KTO, SFT, Recipe, from_mapping
from trainer.runs import Run, RunConfig
from trainer.stage import Setting
from trainer.two_stages import join_adapters, merge_into_base
from trainer.usage import Usage, together
from trainer.weights import ADAPTER, MODEL, save_weights, write_gguf_form

WEIGHTS = "weights"  # of a stage, below its checkpoints
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
    recipe = from_mapping(config.recipe_name, config.recipe).halved(run.halvings)
    process = PartialState(cpu=config.device == "cpu")
    _check_processes(process, config)
    progress = Progress(run, is_main=process.is_main_process)
    progress.write("loading")
    with process.main_process_first():
        base_dir = ensure_base(BaseModel.from_dict(config.base), Path(config.models_dir))
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    weights = run.directory / (MODEL if recipe.is_full else ADAPTER)
    checkpoints = run.directory / FOLDER
    setting = Setting(run, recipe, base_dir, tokenizer, checkpoints, progress)
    if len(recipe.stages()) == 1:
        facts = [_train_stage(setting, weights)]
    else:
        facts = _train_stages(setting, process)
        if process.is_main_process:
            _unite(checkpoints, weights)
    progress.close()
    if process.is_main_process:
        write_gguf_form(run, base_dir)
        write_json(run.directory / "training.json", {**_sums(facts), "base_directory": str(base_dir)})
        remove_checkpoints(run.directory)  # and the stages: nothing goes on from there any more
    process.wait_for_everyone()
    process.destroy_process_group()


def _train_stages(setting: Setting, process: Any) -> list[dict[str, Any]]:
    """Train two stages, the second from where the first ended; what training.json says of each.

    A first stage that is done is not done again by a job that goes on after a kill: stage.json says that it is.
    """
    first, second = setting.recipe.stages()
    stage1, stage2, merged = (setting.output_dir / name for name in ("stage1", "stage2", "merged"))
    done = read_json(stage1 / "stage.json")
    if done is None:
        done = _train_stage(replace(setting, recipe=first, output_dir=stage1), stage1 / WEIGHTS, later=second)
        gc.collect()  # its trainer and its model are not needed any more
        if process.is_main_process:
            write_json(stage1 / "stage.json", done)
    if process.is_main_process and not first.is_full and not merged.is_dir():
        merge_into_base(setting.base_dir, stage1 / WEIGHTS, merged)
    process.wait_for_everyone()
    begin = stage1 / WEIGHTS if first.is_full else merged
    setting = replace(setting, recipe=second, base_dir=begin, output_dir=stage2)
    return [done, _train_stage(setting, stage2 / WEIGHTS, done=done)]


def _train_stage(
    setting: Setting,
    saved: Path,
    *,
    done: Mapping[str, Any] | None = None,
    later: Recipe | None = None,
) -> dict[str, Any]:
    """Train one stage and save its weights in `saved`; returns what training.json says of it.

    `done` says the same of the stage before, `later` is the recipe of the one to come, whose steps are a plan until it
    begins.
    """
    config, recipe, progress = setting.run.config, setting.recipe, setting.progress
    progress.write("loading")
    stage = METHODS[recipe.method](setting)
    steps_before, rows_before = (done["steps"], done["pairs"]) if done else (0, 0)
    to_come = later.total_steps(stage.rows, config.max_steps) if later else 0
    progress.start("training", total_steps=steps_before + stage.total_steps + to_come)
    trainer = stage.trainer
    _check_strategy(trainer.accelerator, Launch.of(config))
    trainer.add_callback(watch(stage, recipe.batch_size, progress, steps_before=steps_before, rows_before=rows_before))
    if stage.validation is not None:
        stage.validation.add_to(trainer, steps_before=steps_before, rows_before=rows_before)
    usage = Usage()
    with usage.training():
        train_from_last(
            trainer,
            setting.run.directory / "metrics.jsonl",
            recipe.save_every_steps,
            say=partial(print, flush=True),
            begins_at=lambda step: progress.write("training", from_step=steps_before + step),
        )
    steps = stage.total_steps
    if stage.validation is not None and stage.validation.stopped_at is not None:
        steps = stage.validation.stopped_at
    _check_all_seen(trainer, steps)
    save_weights(trainer, saved, str(config.base["name"]))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "method": recipe.method,
        "steps": steps,
        "pairs": stage.rows,
        "dropped_over_long": stage.dropped_over_long,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation": stage.validation.facts if stage.validation else None,
        "measured": usage.measured(trainer.accelerator),
        **stage.facts,
    }


def _unite(checkpoints: Path, weights: Path) -> None:
    """The weights of both stages as those of one."""
    shutil.rmtree(weights, ignore_errors=True)  # of a job that was killed here
    first, second = checkpoints / "stage1" / WEIGHTS, checkpoints / "stage2" / WEIGHTS
    if weights.name == MODEL:
        shutil.copytree(second, weights)
    else:
        join_adapters(first, second, weights)


def _sums(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """training.json from the facts of the stages: those of the last one, steps and rows of all."""
    sums = {key: sum(stage[key] for stage in facts) for key in ("steps", "pairs")}
    return {**facts[-1], **sums, "measured": together([stage["measured"] for stage in facts]), "stages": facts}


def _check_processes(process: Any, config: RunConfig) -> None:
    if process.num_processes != config.num_processes:
        raise WrongProcessCount(
            f"{config.num_processes} processes were asked for, {process.num_processes} started. "
            "Check the accelerate configuration: a wrong distributed_type starts one process without a word."
        )
    if config.device == "gpu" and process.device.type == "cpu":
        raise JobError("This run was started for a GPU but torch sees none. Check the driver and the build of torch.")


def _check_strategy(accelerator: Any, launch: Launch) -> None:
    """accelerate turns FSDP on CPUs into DDP, and some configurations into a single process, without a word."""
    ddp = "MULTI_CPU" if launch.device == "cpu" else "MULTI_GPU"
    wanted = {"single": "NO", "ddp": ddp, "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[launch.strategy]
    started = accelerator.distributed_type.value
    if started != wanted or (launch.strategy == "fsdp2" and not accelerator.is_fsdp2):
        raise WrongStrategy(
            f"The strategy {launch.strategy} was asked for (accelerate's {wanted}), accelerate started {started}. "
            "Check the accelerate configuration: it can quietly start another strategy than the one it names."
        )


def _check_all_seen(trainer: Any, total_steps: int) -> None:
    if trainer.state.global_step != total_steps:
        raise JobError(f"Training stopped at step {trainer.state.global_step} of {total_steps} without an error.")


def main() -> None:
    """`python -m trainer.job RUN_DIR`, once in each process of the launch."""
    new_files_private()
    run = Run(Path(sys.argv[1]))
    if run.training is not None:  # killed after its last word, or pasted a second time: both are done
        remove_checkpoints(run.directory)
        print(f"{run.directory} holds a finished training. `zloop train --show-command` makes a new directory.")
        return
    try:
        train(run)
    except Exception as error:
        told = _in_our_words(run, error)
        if told is None:
            raise
        failure = {"stage": "training", "reason": str(told), "kind": type(told).__name__}
        with suppress(OSError):  # on a full disk the parent says what it sees
            write_json(run.directory / "failure.json", failure)
        raise SystemExit(f"Stopped: {told}") from error


def _in_our_words(run: Run, error: Exception) -> Exception | None:
    """An error with a sentence for people; None for one that we know nothing about."""
    if isinstance(error, TrainerError | StoreError):
        return error
    step = max((line["step"] for line in run.metrics()[-1:]), default=0)
    if is_out_of_memory(error):
        recipe = from_mapping(run.config.recipe_name, run.config.recipe).halved(run.halvings)
        return out_of_memory(f"at step {step + 1}", training_advice(recipe), error)
    return disk_full(run.directory, step) if is_disk_full(error) else None


if __name__ == "__main__":
    main()
