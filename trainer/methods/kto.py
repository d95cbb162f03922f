"""KTO (Ethayarajh et al., 2024, arXiv:2402.01306) by TRL: learns from single answers called good or bad.

Learns from the ratings of a snapshot: thumbs, both answers of a pair called *both bad*, imported labelled answers. The
rarer label weighs more, so that good and bad answers count the same together (the paper's equation 8, its lower bound).
The reference is the base, as with DPO. The drift from it is measured on answers put to other prompts of the micro
batch, which is why that has 2 rows at least.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback_store.records import UnpairedPreference
from feedback_store.snapshots import load_ratings, load_snapshot
from trainer.errors import NothingToTrainOn
from trainer.progress import reference_loss
from trainer.recipe import Recipe
from trainer.stage import Setting, Stage, shared_arguments
from trainer.tokens import answer_as_read, prompt_length
from trainer.tuning import adapter_config

OWN = ("rating", "pick")


def prepare(setting: Setting) -> Stage:
    """The trainer on the ratings of the run's snapshot. Raises NothingToTrainOn."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    ratings = load_ratings(load_snapshot(Path(config.snapshot["directory"])).ratings_path)
    rows, dropped = choose_ratings(ratings, recipe, config.max_steps, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(rows), config.max_steps)
    good, bad = label_weights(rows)
    trainer = KTOTrainer(
        model=str(setting.base_dir),
        args=KTOConfig(
            **shared_arguments(setting, total_steps), beta=recipe.beta, desirable_weight=good, undesirable_weight=bad
        ),
        train_dataset=Dataset.from_list([_row(answer_as_read(tokenizer, rating)) for rating in rows]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
    )
    first_step = rows[: recipe.batch_size]
    # 1 - sigmoid(0) for every answer, times its weight.
    loss = sum(good if rating.label else bad for rating in first_step) / len(first_step) / 2
    first = reference_loss(loss, f"half the mean weight of its answers = {loss:.4f}")
    return Stage(trainer, len(rows), total_steps, dropped, lambda _logs: first, {"label_weights": [good, bad]})


def choose_ratings(
    ratings: Sequence[UnpairedPreference], recipe: Recipe, max_steps: int | None, seed: int, tokenizer: Any
) -> tuple[list[UnpairedPreference], int]:
    """The rated answers to learn from, in the order they are seen, and how many were dropped for an over-long prompt.

    Our own come before imported ones when the steps do not suffice for all; both are shuffled by `seed`. No last micro
    batch of one answer is left, which could be compared with itself only. Raises NothingToTrainOn without both labels.
    """
    shuffle = random.Random(seed)  # noqa: S311 - an order that can be made again, not a secret
    order = shuffle.sample(list(ratings), len(ratings))
    order.sort(key=lambda rating: rating.source not in OWN)
    short = [rating for rating in order if prompt_length(tokenizer, rating.prompt) < recipe.max_length]
    chosen = short[: recipe.total_steps(max(1, len(short)), max_steps) * recipe.batch_size]
    if len(chosen) % recipe.micro_batch_size == 1:
        chosen.pop()
    good = sum(rating.label for rating in chosen)
    if not 0 < good < len(chosen):
        raise NothingToTrainOn(
            f"KTO needs rated answers of both kinds: {good} good and {len(chosen) - good} bad ones are there to learn "
            f"from, {len(order) - len(short)} have prompts longer than max_length {recipe.max_length} tokens. "
            "Rate more answers, up and down."
        )
    return shuffle.sample(chosen, len(chosen)), len(order) - len(short)


def label_weights(rows: Sequence[UnpairedPreference]) -> tuple[float, float]:
    """The weights of a good and of a bad answer: 1 for the more frequent kind."""
    good = sum(rating.label for rating in rows)
    bad = len(rows) - good
    return max(1.0, bad / good), max(1.0, good / bad)


def _row(rating: UnpairedPreference) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in rating.prompt],
        "completion": [{"role": "assistant", "content": rating.completion}],
        "label": rating.label,
    }
