"""Direct Preference Optimization (Rafailov et al., 2023). The reference is the base: the adapter switched off.

`choose_rows` says which pairs in which order, `make_trainer` takes the fast step of `dpo_trainer.py` where it is exact
for the model at hand and TRL's own where it is not. Where every weight moves there is no adapter to switch off: the
reference's log-probabilities are then computed before the first step (or, by TRL's own step, by a second model that is
loaded from the directory of the base). Learns from the train part of a snapshot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from feedback_store.records import Preference
from feedback_store.snapshots import load_preferences, load_snapshot
from trainer.errors import NothingToTrainOn
from trainer.progress import FIRST_LOSS, FirstLoss, reference_loss
from trainer.recipe import Recipe
from trainer.reference_cache import REFERENCES, ReferenceCache, fingerprint
from trainer.stage import Setting, Stage, shared_arguments
from trainer.tokens import tokenise
from trainer.tuning import adapter_config


def prepare(setting: Setting) -> Stage:
    """The trainer on the preferences of the run's snapshot. Raises NothingToTrainOn."""
    config, recipe, tokenizer = setting.run.config, setting.recipe, setting.tokenizer
    preferences = load_preferences(load_snapshot(Path(config.snapshot["directory"])).train_path)
    rows, dropped = choose_rows(preferences, recipe, config.max_steps, config.seed, tokenizer)
    total_steps = recipe.total_steps(len(rows), config.max_steps)
    trainer = make_trainer(
        recipe,
        rows,
        base_dir=setting.base_dir,
        tokenizer=tokenizer,
        arguments=arguments(setting, total_steps),
        references=Path(config.models_dir) / REFERENCES,
        report=lambda done, total: setting.progress.write("references", references={"done": done, "total": total}),
    )
    return Stage(trainer, len(rows), total_steps, dropped, partial(first_loss, recipe), trainer.facts)


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


def make_trainer(
    recipe: Recipe,
    preferences: Sequence[Preference],
    *,
    base_dir: Path,
    tokenizer: Any,
    arguments: Any,
    references: Path,
    report: Callable[[int, int], None],
) -> Any:
    """The trainer on `preferences`: the fast one, or TRL's with the reason in its log and `facts`.

    Each step holds the pairs it holds in the order given. What the reference thinks of pairs is kept under
    `references`; `report` gets how many are known, of how many, while they are computed.
    """
    from accelerate.logging import get_logger
    from transformers import AutoConfig

    from trainer.dpo_trainer import PairTrainer, StockTrainer, why_stock

    rows = [(tokenise(tokenizer, preference, recipe.max_length), preference.weight) for preference in preferences]
    common = {
        "model": str(base_dir),
        "args": arguments,
        "rows": rows,
        "processing_class": tokenizer,
        "peft_config": adapter_config(recipe),
    }
    why = (
        why_stock(AutoConfig.from_pretrained(base_dir), arguments)
        if recipe.fast_step == "auto"
        else "the recipe says so"
    )
    if why is None:
        trainer = PairTrainer(tokens_per_batch=recipe.tokens_per_batch, **common)
        why = trainer.difference()
        if why is None:
            trainer.add_references(ReferenceCache(references, fingerprint(base_dir, trainer.precision)), report)
            return trainer
    get_logger(__name__).warning(f"The fast step is off ({why}): TRL's own is used.")
    return StockTrainer(why=why, **common)


def arguments(setting: Setting, total_steps: int) -> Any:
    """The recipe in the words of TRL's DPO, for one process of the run."""
    from trl import DPOConfig

    recipe = setting.recipe
    return DPOConfig(
        **shared_arguments(setting, total_steps),
        loss_type=["sigmoid", "sft"] if recipe.loss == "sigmoid_sft" else [recipe.loss],
        loss_weights=[1.0, recipe.sft_weight] if recipe.loss == "sigmoid_sft" else None,
        label_smoothing=recipe.label_smoothing,
        beta=recipe.beta,
    )


def first_loss(recipe: Recipe, logs: Mapping[str, float]) -> FirstLoss | None:
    """The loss before anything was learned, given the weights of the step; None where it hangs on the data."""
    known = {"sigmoid": FIRST_LOSS, "robust": FIRST_LOSS, "apo_zero": 1.0, "ipo": 1 / (2 * recipe.beta) ** 2}
    if recipe.loss not in known:
        return None
    loss = known[recipe.loss] * logs.get("weights", 1.0)
    name = "ln 2 = " if loss == FIRST_LOSS else ""
    return reference_loss(loss, f"{name}{loss:.4f}")
