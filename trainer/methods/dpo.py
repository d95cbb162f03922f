"""Direct Preference Optimization (Rafailov et al., 2023) by TRL. The reference is the base: the adapter switched off.

Where every weight moves there is no adapter to switch off; the reference is then a second model, loaded by TRL from the
directory of the base. Learns from the train part of a snapshot.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback_store.records import Preference
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.errors import NothingToTrainOn
from trainer.progress import FIRST_LOSS, FIRST_LOSS_TOLERANCE, FirstLoss
from trainer.recipe import Recipe
from trainer.stage import Setting, Stage, shared_arguments
from trainer.tokens import as_read, tokenise
from trainer.tuning import adapter_config

REFERENCE = FirstLoss(
    FIRST_LOSS - FIRST_LOSS_TOLERANCE,
    FIRST_LOSS + FIRST_LOSS_TOLERANCE,
    f"ln 2 = {FIRST_LOSS:.4f} ± {FIRST_LOSS_TOLERANCE}",
    "the reference is not the model that training starts from",
)


def prepare(setting: Setting) -> Stage:
    """The trainer on the preferences of the run's snapshot. Raises NothingToTrainOn."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    preferences = load_preferences(load_snapshot(Path(config.snapshot["directory"])).train_path)
    rows, dropped = choose_rows(preferences, recipe, config.max_steps, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(rows), config.max_steps)
    trainer = DPOTrainer(
        model=str(setting.base_dir),
        args=DPOConfig(**shared_arguments(setting, total_steps), loss_type="sigmoid", beta=recipe.beta),
        train_dataset=Dataset.from_list([_row(as_read(tokenizer, preference)) for preference in rows]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
    )
    return Stage(trainer, len(rows), total_steps, dropped, REFERENCE)


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


def _row(preference: Preference) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in preference.prompt],
        "chosen": [{"role": "assistant", "content": preference.chosen}],
        "rejected": [{"role": "assistant", "content": preference.rejected}],
    }
