"""Supervised fine-tuning by TRL: the next token of the chosen answers, of the answers only.

Learns from the train part of a snapshot: from every chosen answer (a pick, a rewrite, an imported row) to its prompt,
which may be a whole dialogue; the last answer of it is learned, what came before is read. What was rejected teaches
nothing. Not covered: files of dialogues that no preference stands for, such as UltraChat.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from feedback_store.records import Preference
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.methods.dpo import choose_rows
from trainer.progress import FirstLoss
from trainer.stage import Setting, Stage, shared_arguments
from trainer.tokens import as_read
from trainer.tuning import adapter_config

GUESSES = 3.0  # a first loss above so many times that of guessing among all tokens is none of this model


def prepare(setting: Setting) -> Stage:
    """The trainer on the chosen answers of the run's snapshot. Raises NothingToTrainOn."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    preferences = load_preferences(load_snapshot(Path(config.snapshot["directory"])).train_path)
    rows, dropped = choose_rows(preferences, recipe, config.max_steps, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(rows), config.max_steps)
    trainer = SFTTrainer(
        model=str(setting.base_dir),
        args=SFTConfig(**shared_arguments(setting, total_steps), completion_only_loss=True),
        train_dataset=Dataset.from_list([_row(as_read(tokenizer, preference)) for preference in rows]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
    )
    return Stage(trainer, len(rows), total_steps, dropped, next_token_loss(len(tokenizer)))


def next_token_loss(vocabulary: int) -> FirstLoss:
    """The mean loss of a token, in nats: above 0, else nothing is learned from; and not far above guessing."""
    high = GUESSES * math.log(vocabulary)
    return FirstLoss(
        1e-6,
        high,
        f"above 0 and below {high:.1f}, {GUESSES:g} times that of guessing",
        "no token is learned from, or the weights do not belong to the tokenizer",
    )


def _row(preference: Preference) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in preference.prompt],
        "completion": [{"role": "assistant", "content": preference.chosen}],
    }
