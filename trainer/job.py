"""CHILD: one run directory in, one adapter out. How it learns is the recipe's method (`methods/`).

Started by `launch.py`; by hand: `accelerate launch --config_file trainer/recipes/accelerate/cpu_single.yaml
-m trainer.job RUN_DIR`. Reads config.json and the snapshot's Parquet, never the database or the environment.
The reference is the base: the same model with the adapter switched off.

It stops with a sentence in failure.json when the number of processes is not the one asked for, when the first loss
is not ln 2 (the reference is wrong), and at the first loss or gradient norm that is not finite. training.json,
written last, means: the adapter is complete.

Not covered: resuming, full fine-tuning, weights per pair, sharing the prompt. bf16 and GPUs are wired, not tested.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from feedback_store.durable import sync_tree, write_json
from feedback_store.errors import StoreError
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.base_model import BaseModel, ensure_base
from trainer.errors import JobError, TrainerError, WrongProcessCount
from trainer.gguf_adapter import write_gguf_adapter
from trainer.methods import dpo
from trainer.progress import Progress, watch
from trainer.recipe import from_mapping
from trainer.runs import Run, RunConfig
from trainer.usage import Usage


def train(run: Run) -> None:
    """Train the adapter of `run`. Raises JobError with the sentence that becomes the run's error."""
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
    train_path = load_snapshot(Path(config.snapshot["directory"])).train_path
    preferences, dropped = dpo.choose_rows(
        load_preferences(train_path), recipe, config.max_steps, config.seed, tokenizer
    )
    total_steps = recipe.total_steps(len(preferences), config.max_steps)
    progress.start("training", total_steps=total_steps)
    trainer = dpo.make_trainer(
        recipe,
        preferences,
        base_dir=base_dir,
        tokenizer=tokenizer,
        arguments=dpo.arguments(run, recipe, total_steps),
    )
    trainer.add_callback(watch(recipe, len(preferences), progress))
    usage = Usage()
    with usage.training():
        trainer.train()
    _check_all_seen(trainer, total_steps)
    facts: dict[str, Any] = {"steps": total_steps, "pairs": len(preferences), "dropped_over_long": dropped}
    facts["measured"] = usage.measured(trainer.accelerator)
    if process.is_main_process:
        _save(trainer, run, base_dir, facts)
    trainer.end()


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


def _save(trainer: Any, run: Run, base_dir: Path, facts: dict[str, Any]) -> None:
    """The adapter, in both forms where the base has both, then training.json."""
    adapter = run.directory / "adapter"
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(adapter, selected_adapters=["default"])
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the version gets a real one
    _make_portable(adapter / "adapter_config.json", str(run.config.base["name"]))
    if run.config.base["gguf"]:  # llama.cpp needs the base as GGUF too: without one, nothing could serve the file
        write_gguf_adapter(adapter, base_dir, run.directory / "adapter.gguf")
    sync_tree(adapter)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(
        run.directory / "training.json",
        {**facts, "base_directory": str(base_dir), "first_loss": losses[0], "last_loss": losses[-1]},
    )


def _make_portable(path: Path, base: str) -> None:
    """Name the base instead of a path on this machine, and order what PEFT keeps in sets."""
    values = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**values, "base_model_name_or_path": base, "target_modules": sorted(values["target_modules"])})


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
