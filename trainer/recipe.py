"""A recipe: how to learn, in one YAML file of `trainer/recipes/` (read here, checked here, used in `job.py`).

One table, `FIELDS`, gives each key its default, its check and its sentence; unknown keys are refused, so a
recipe never holds a key nobody reads. A run stores its recipe resolved, with every key.

Not covered: other losses than DPO's sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from feedback_store.mixing import Mix
from trainer.errors import BadRecipe, UnknownRecipe

RECIPES = Path(__file__).parent / "recipes"
DEFAULT = "dpo-lora"
PRACTICE = "practice"


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a recipe: default, the types allowed, a check with its wording, and what it is for."""

    default: Any
    types: tuple[type, ...]
    check: Callable[[Any], bool]
    allowed: str
    about: str


def _number(default: float | int, low: float, high: float, about: str, *, whole: bool = False) -> Field:
    types = (int,) if whole else (int, float)
    return Field(default, types, lambda value: low <= value <= high, f"a number from {low:g} to {high:g}", about)


def _optional(default: float | None, low: float, high: float, about: str, *, whole: bool = False) -> Field:
    types = (int, type(None)) if whole else (int, float, type(None))
    allowed = f"a number from {low:g} to {high:g}, or null"
    return Field(default, types, lambda value: value is None or low <= value <= high, allowed, about)


def _switch(default: bool, about: str) -> Field:
    return Field(default, (bool,), lambda _value: True, "true or false", about)


def _choice(default: str, options: tuple[str, ...], about: str) -> Field:
    return Field(default, (str,), lambda value: value in options, "one of " + ", ".join(options), about)


FIELDS: dict[str, Field] = {
    "about": Field("", (str,), lambda _value: True, "text", "one sentence for people who choose a recipe"),
    "lora_rank": _number(16, 1, 512, "rank of the adapter, on all linear layers", whole=True),
    "lora_alpha": _number(32, 1, 1024, "scale of the adapter: alpha / rank"),
    "beta": _number(0.1, 1e-4, 10, "strength of the pull towards the reference in the DPO loss"),
    "learning_rate": _number(1e-4, 1e-8, 1e-1, "peak learning rate of AdamW"),
    "lr_schedule": _choice("linear", ("linear", "cosine", "constant"), "how the learning rate falls"),
    "warmup_ratio": _number(0.05, 0, 0.5, "part of the steps that warm up; rounded down, so short runs have none"),
    "max_grad_norm": _number(1.0, 1e-3, 1e3, "gradients are clipped to this norm"),
    "batch_size": _number(8, 1, 4096, "pairs a step, over all processes", whole=True),
    "micro_batch_size": _number(2, 1, 4096, "pairs in memory at once, per process", whole=True),
    "epochs": _number(1, 1, 100, "times each pair is seen", whole=True),
    "max_steps": _optional(None, 1, 10**9, "a cap on the steps", whole=True),
    "max_length": _number(1024, 16, 131072, "tokens of prompt and answer; longer answers are cut", whole=True),
    "held_out_pairs": _number(40, 0, 100000, "cap on the pairs of the evaluation", whole=True),
    "edits": _switch(True, "learn from people's rewrites of answers"),
    "retries": _switch(False, "learn, weakly, from the answer people kept after asking again"),
    "replay_ratio": _optional(None, 0, 1e6, "imported rows for each of our own; null: all of them"),
    "max_rater_share": _optional(0.5, 1e-3, 1, "the largest part of the rated rows that one person may have"),
    "max_per_prompt": _optional(8, 1, 10**6, "rows on nearly the same prompt", whole=True),
    "eval_every_steps": _optional(None, 0, 1e9, "validate every so many steps; 0: never, null: if cheap", whole=True),
    "early_stop_patience": _optional(3, 1, 1000, "validations below the best that stop; null: go on", whole=True),
    "precision": _choice("auto", ("auto", "fp32", "bf16"), "auto: fp32 on CPU, bf16 on a GPU"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. The names and meanings are those of `FIELDS`."""

    name: str
    about: str
    lora_rank: int
    lora_alpha: float
    beta: float
    learning_rate: float
    lr_schedule: str
    warmup_ratio: float
    max_grad_norm: float
    batch_size: int
    micro_batch_size: int
    epochs: int
    max_steps: int | None
    max_length: int
    held_out_pairs: int
    edits: bool
    retries: bool
    replay_ratio: float | None
    max_rater_share: float | None
    max_per_prompt: int | None
    eval_every_steps: int | None
    early_stop_patience: int | None
    precision: str

    def as_dict(self) -> dict[str, Any]:
        """Every key with its value, `name` left out: what `from_mapping` reads back."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def mix(self, seed: int) -> Mix:
        """Which preferences a snapshot for this recipe takes."""
        return Mix(
            edits=self.edits,
            retries=self.retries,
            replay_ratio=self.replay_ratio,
            max_rater_share=self.max_rater_share,
            max_per_prompt=self.max_per_prompt,
            seed=seed,
        )

    def total_steps(self, rows: int, max_steps: int | None = None) -> int:
        """Optimizer steps on `rows` pairs; the smaller of the run's and the recipe's caps applies."""
        caps = [cap for cap in (self.max_steps, max_steps) if cap is not None]
        return min([self.epochs * math.ceil(rows / self.batch_size), *caps])

    def per_process_batch(self, num_processes: int) -> int:
        """Pairs of one step on one process. Raises BadRecipe when the batch cannot be split evenly."""
        if self.batch_size % num_processes:
            raise BadRecipe(
                f"Recipe {self.name}: batch_size {self.batch_size} cannot be split over {num_processes} processes. "
                f"Use a number of processes that divides {self.batch_size}."
            )
        return self.batch_size // num_processes


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises UnknownRecipe, BadRecipe."""
    if name not in recipe_names():
        raise UnknownRecipe(f"There is no recipe {name!r}. Recipes: {', '.join(recipe_names())}.")
    return from_mapping(name, yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")) or {})


def from_mapping(name: str, values: Mapping[str, Any]) -> Recipe:
    """Check `values` against `FIELDS`, fill in defaults. Raises BadRecipe naming the key, the value and the limit."""
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise BadRecipe(f"Recipe {name}: unknown key {unknown[0]!r}. Known keys: {', '.join(FIELDS)}.")
    return Recipe(name=name, **{key: _checked(name, key, values.get(key, f.default)) for key, f in FIELDS.items()})


def _checked(name: str, key: str, value: Any) -> Any:
    field = FIELDS[key]
    wrong_type = not isinstance(value, field.types) or (isinstance(value, bool) and bool not in field.types)
    if wrong_type or not field.check(value):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) and "e-" in value else ""
        raise BadRecipe(f"Recipe {name}: {key} is {value!r}, it must be {field.allowed}{hint}.")
    return value
