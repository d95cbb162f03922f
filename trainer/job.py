"""CHILD: one run directory in, one adapter out. LoRA DPO with TRL from the base, read from top to bottom.

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
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feedback_store.durable import sync_tree, write_json
from feedback_store.errors import StoreError
from feedback_store.records import Preference
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.base_model import BaseModel, ensure_base
from trainer.errors import Diverged, JobError, NothingToTrainOn, TrainerError, WrongProcessCount, WrongReference
from trainer.gguf_adapter import write_gguf_adapter
from trainer.recipe import Recipe, from_mapping
from trainer.runs import Run, RunConfig
from trainer.tokens import as_read, tokenise

FIRST_LOSS = math.log(2)
FIRST_LOSS_TOLERANCE = 1e-3


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
    preferences, dropped = choose_rows(load_preferences(train_path), recipe, config.max_steps, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(preferences), config.max_steps)
    progress.start("training", total_steps=total_steps)
    arguments = _arguments(run, recipe, total_steps)
    trainer = _make_trainer(recipe, preferences, base_dir=base_dir, tokenizer=tokenizer, arguments=arguments)
    trainer.add_callback(_watch(recipe, len(preferences), progress))
    trainer.train()
    _check_all_seen(trainer, total_steps)
    if process.is_main_process:
        _save(trainer, run, base_dir, {"steps": total_steps, "pairs": len(preferences), "dropped_over_long": dropped})
    trainer.end()


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


class Progress:
    """progress.json and metrics.jsonl: what the parent and the pages read while the job runs."""

    def __init__(self, run: Run, *, is_main: bool) -> None:
        self._directory = run.directory
        self._is_main = is_main
        self._facts: dict[str, Any] = {}

    def start(self, stage: str, **facts: Any) -> None:
        """A new stage begins now."""
        self._facts = {"since": time.time(), **facts}
        self.write(stage)

    def write(self, stage: str, **facts: Any) -> None:
        """The heartbeat."""
        if self._is_main:
            self._facts |= facts
            write_json(self._directory / "progress.json", {"stage": stage, **self._facts, "time": time.time()})

    def step(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, readable at once."""
        if self._is_main:
            with (self._directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.write("training")


def metrics_line(step: int, pairs: int, logs: Mapping[str, float], now: float) -> dict[str, Any]:
    """One line of metrics.jsonl from TRL's log of one step."""
    kept = {key: value for key, value in logs.items() if key.startswith(("rewards/", "logps/"))}
    wanted = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
    return {"step": step, "time": now, "pairs": pairs, **wanted, **kept}


def check_step(step: int, logs: Mapping[str, float]) -> None:
    """Raises WrongReference or Diverged on the log of a step that must not be followed by another one."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            raise Diverged(
                f"At step {step} {key} is {logs[key]}: the training diverged. Lower learning_rate in the recipe."
            )
    if step == 1 and abs(logs["loss"] - FIRST_LOSS) > FIRST_LOSS_TOLERANCE:
        raise WrongReference(
            f"The first loss is {logs['loss']:.4f}, it must be ln 2 = {FIRST_LOSS:.4f} ± {FIRST_LOSS_TOLERANCE}: "
            "the reference is not the model that training starts from. Nothing was published."
        )


def _make_trainer(
    recipe: Recipe, preferences: Sequence[Preference], *, base_dir: Path, tokenizer: Any, arguments: Any
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOTrainer

    return DPOTrainer(
        model=str(base_dir),
        args=arguments,
        train_dataset=Dataset.from_list([_row(as_read(tokenizer, preference)) for preference in preferences]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def _arguments(run: Run, recipe: Recipe, total_steps: int) -> Any:
    from trl import DPOConfig

    config = run.config
    per_process = recipe.per_process_batch(config.num_processes)
    micro = math.gcd(recipe.micro_batch_size, per_process)
    on_gpu = config.device == "gpu"
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    return DPOConfig(
        output_dir=str(run.directory / "checkpoints"),
        loss_type="sigmoid",
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


def _watch(recipe: Recipe, rows: int, progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Writes a line a step and stops a training that has gone wrong."""

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" not in logs:
                return
            step = int(state.global_step)
            check_step(step, logs)
            progress.step(metrics_line(step, pairs_seen(step, recipe.batch_size, rows), logs, time.time()))

    return Watch()


def pairs_seen(step: int, batch_size: int, rows: int) -> int:
    """Pairs gone through after `step` steps; the last step of an epoch may be short."""
    epochs, rest = divmod(step, math.ceil(rows / batch_size))
    return epochs * rows + rest * batch_size


def _row(preference: Preference) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in preference.prompt],
        "chosen": [{"role": "assistant", "content": preference.chosen}],
        "rejected": [{"role": "assistant", "content": preference.rejected}],
    }


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
