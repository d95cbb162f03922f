"""Continued pretraining: the next token of a team's own texts (Gururangan et al., 2020, arXiv:2004.10964).

Learns from the .txt and .md files that were there when the run was planned (`texts.py`), one after the other in an
order that the seed gives, an end-of-text token behind each, cut into blocks of `max_length` tokens. Every token is
learned, and no chat template is used. The preferences of the snapshot are only there to judge the version on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from feedback_store.control_text import neutralise
from trainer.errors import NothingToTrainOn
from trainer.methods.sft import next_token_loss
from trainer.stage import Setting, Stage, shared_arguments
from trainer.texts import load_texts
from trainer.tokens import markers
from trainer.tuning import adapter_config


def prepare(setting: Setting) -> Stage:
    """The trainer on the texts of the run. Raises NothingToTrainOn, JobError where a text is not what it was."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    blocks = cut(load_texts(config.snapshot["texts"]), recipe.max_length, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(blocks), config.max_steps)
    blocks = blocks[: total_steps * recipe.batch_size]
    trainer = SFTTrainer(
        model=str(setting.base_dir),
        args=SFTConfig(**shared_arguments(setting, total_steps)),
        train_dataset=Dataset.from_list([{"input_ids": block} for block in blocks]),
        processing_class=tokenizer,
        peft_config=adapter_config(recipe),
    )
    return Stage(trainer, len(blocks), total_steps, 0, partial(next_token_loss, len(tokenizer)))


def cut(texts: Sequence[str], length: int, seed: int, tokenizer: Any) -> list[list[int]]:
    """The texts as blocks of `length` token ids, the last one shorter; texts and blocks shuffled by `seed`."""
    shuffle = random.Random(seed)  # noqa: S311 - an order that can be made again, not a secret
    stream: list[int] = []
    for text in shuffle.sample(list(texts), len(texts)):
        tokens = tokenizer(neutralise(text, markers(tokenizer)), add_special_tokens=False)["input_ids"]
        stream += [*tokens, tokenizer.eos_token_id] if tokens else []
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    blocks = [block for block in blocks if len(block) > 1]  # one token alone predicts nothing
    if not blocks:
        raise NothingToTrainOn("The texts hold no words. Put .txt or .md files with some text into the folder.")
    return shuffle.sample(blocks, len(blocks))
