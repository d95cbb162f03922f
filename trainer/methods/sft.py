"""Supervised fine-tuning by TRL: the next token of good answers, of the answers only.

Learns from two things. From the train part of a snapshot: every chosen answer (a pick, a rewrite, an imported row) to
its prompt, which may be a dialogue that is read and not learned; what was rejected teaches nothing. And from files of
dialogues such as UltraChat's, where the team has put some (`texts.py`): there every answer is learned. A dialogue that
begins with a held-out prompt is left out, for versions are judged on these.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from feedback_store.preferences import HELD_OUT, split_of
from feedback_store.records import Message, Preference
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.errors import NothingToTrainOn
from trainer.progress import FirstLoss
from trainer.recipe import Recipe
from trainer.stage import Setting, Stage, shared_arguments
from trainer.texts import load_dialogues
from trainer.tokens import answer_spans, tokenise
from trainer.tuning import adapter_config

GUESSES = 3.0  # a first loss above so many times that of guessing among all tokens is none of this model
NOT_LEARNED = -100

Example = dict[str, list[int]]


def prepare(setting: Setting) -> Stage:
    """The trainer on the chosen answers and dialogues of the run. Raises NothingToTrainOn, JobError."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    preferences = load_preferences(load_snapshot(Path(config.snapshot["directory"])).train_path)
    described = config.snapshot.get("dialogues")
    dialogues = load_dialogues(described) if described else []
    examples, dropped = choose_examples(
        preferences, dialogues, recipe=recipe, max_steps=config.max_steps, seed=config.seed, tokenizer=tokenizer
    )
    total_steps = recipe.total_steps(len(examples), config.max_steps)
    trainer = SFTTrainer(
        model=str(setting.base_dir),
        args=SFTConfig(**shared_arguments(setting, total_steps)),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
    )
    return Stage(trainer, len(examples), total_steps, dropped, partial(next_token_loss, len(tokenizer)))


def choose_examples(
    preferences: Sequence[Preference],
    dialogues: Sequence[tuple[Message, ...]],
    *,
    recipe: Recipe,
    max_steps: int | None,
    seed: int,
    tokenizer: Any,
) -> tuple[list[Example], int]:
    """Token ids and labels in the order they are seen, and how many rows were dropped for an over-long prompt.

    Own picks come before the rest when the steps do not suffice for all; both are shuffled by `seed`.
    """
    shuffle = random.Random(seed)  # noqa: S311 - an order that can be made again, not a secret
    rows: list[Preference | tuple[Message, ...]] = [*preferences, *(d for d in dialogues if split_of(d) != HELD_OUT)]
    order = shuffle.sample(rows, len(rows))
    order.sort(key=lambda row: not (isinstance(row, Preference) and row.source == "pick"))
    wanted = recipe.total_steps(len(order), max_steps) * recipe.batch_size
    chosen: list[Example] = []
    dropped = 0
    for row in order:
        if len(chosen) == wanted:
            break
        example = _of_answer(row, recipe, tokenizer) if isinstance(row, Preference) else _of(row, recipe, tokenizer)
        if any(label != NOT_LEARNED for label in example["labels"]):
            chosen.append(example)
        else:
            dropped += 1
    if not chosen:
        raise NothingToTrainOn(
            f"All {len(order)} prompts are longer than max_length {recipe.max_length} tokens. Raise max_length."
        )
    return shuffle.sample(chosen, len(chosen)), dropped


def next_token_loss(vocabulary: int, _logs: Mapping[str, float]) -> FirstLoss:
    """The mean loss of a token, in nats: above 0, else nothing is learned from; and not far above guessing."""
    high = GUESSES * math.log(vocabulary)
    return FirstLoss(
        1e-6,
        high,
        f"above 0 and below {high:.1f}, {GUESSES:g} times that of guessing",
        "no token is learned from, or the weights do not belong to the tokenizer",
    )


def _of_answer(preference: Preference, recipe: Recipe, tokenizer: Any) -> Example:
    tokens = tokenise(tokenizer, preference, recipe.max_length)
    prompt = tokens.prompt[: recipe.max_length]
    return {"input_ids": prompt + tokens.chosen, "labels": [NOT_LEARNED] * len(prompt) + tokens.chosen}


def _of(dialogue: tuple[Message, ...], recipe: Recipe, tokenizer: Any) -> Example:
    ids, spans = answer_spans(tokenizer, dialogue)
    labels = [NOT_LEARNED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids[: recipe.max_length], "labels": labels[: recipe.max_length]}
