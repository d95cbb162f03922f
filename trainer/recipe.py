"""A recipe: how to learn, in one YAML file (read here, checked here, used in `job.py`).

Those that ship are in `trainer/recipes/`, a team's own in `recipes/` of the data directory. One table, `FIELDS`, gives
each key its default, its check, its sentence and the methods it belongs to; unknown keys and keys of another method
are refused, so a recipe never holds a key nobody reads. A run stores its recipe resolved, with every key that applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from feedback_store.bounded import load_yaml
from feedback_store.mixing import OFF, PAIRS, RATER_WEIGHTS, RATINGS, TEXT, Mix
from trainer.errors import BadRecipe, UnknownRecipe

RECIPES = Path(__file__).parent / "recipes"
DEFAULT = "dpo-lora"
PRACTICE = "practice"
# The fast step's tokens in memory at once where a recipe says nothing: on a CPU a longer row is no faster, only larger.
TOKENS = {"cpu": 1024, "gpu": 8192}
FEWEST_TOKENS = 128
LOSSES = ("sigmoid", "ipo", "robust", "apo_zero", "sigmoid_sft")

DPO, SFT, SFT_THEN_DPO, KTO, CONTINUED_PRETRAINING = METHODS = (
    "dpo", "sft", "sft-then-dpo", "kto", "continued-pretraining",
)  # fmt: skip
LORA, QLORA, FULL = TUNINGS = ("lora", "qlora", "full")
_ON_PAIRS = (DPO, SFT_THEN_DPO)
_WITH_REFERENCE = (*_ON_PAIRS, KTO)
_ADAPTERS = (LORA, QLORA)
_LEARNS_FROM = {KTO: RATINGS, CONTINUED_PRETRAINING: TEXT}


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a recipe: default, types allowed, a check with its wording, what it is for, and where it applies."""

    default: Any
    types: tuple[type, ...]
    check: Callable[[Any], bool]
    allowed: str
    about: str
    methods: tuple[str, ...] = METHODS
    tunings: tuple[str, ...] = TUNINGS


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


def _folder(about: str) -> Field:
    def is_folder(value: str | None) -> bool:
        return value is None or Path(value).is_absolute()

    return Field(None, (str, type(None)), is_folder, "the absolute path of a folder, or null", about)


def _only(field: Field, *, methods: tuple[str, ...] = METHODS, tunings: tuple[str, ...] = TUNINGS) -> Field:
    """The same key, which these methods or tunings have alone."""
    return replace(field, methods=methods, tunings=tunings)


FIELDS: dict[str, Field] = {
    "about": Field("", (str,), lambda _value: True, "text", "one sentence for people who choose a recipe"),
    "method": _choice(DPO, METHODS, "what is learned from, and how: a file of trainer/methods"),
    "tuning": _choice(LORA, TUNINGS, "which weights move: an adapter, an adapter on a 4-bit base, all of them"),
    "lora_rank": _only(_number(16, 1, 512, "rank of the adapter, on all linear layers", whole=True), tunings=_ADAPTERS),
    "lora_alpha": _only(_number(32, 1, 1024, "scale of the adapter: alpha / rank"), tunings=_ADAPTERS),
    "beta": _only(
        _number(0.1, 1e-4, 10, "strength of the pull towards the reference in the loss of DPO or KTO"),
        methods=_WITH_REFERENCE,
    ),
    "loss": _only(
        _choice("sigmoid", LOSSES, "of DPO: sigmoid; ipo; robust (raters who err); apo_zero; sigmoid_sft"),
        methods=_ON_PAIRS,
    ),
    "label_smoothing": _only(
        _number(0.0, 0, 0.49, "for loss robust: the part of the picks that are taken to be wrong"), methods=_ON_PAIRS
    ),
    "sft_weight": _only(
        _number(0.2, 0, 10, "for loss sigmoid_sft: weight of the likelihood of the chosen answer"), methods=_ON_PAIRS
    ),
    "sft_learning_rate": _only(
        _number(2e-4, 1e-8, 1e-1, "peak learning rate of the first stage, the second has learning_rate"),
        methods=(SFT_THEN_DPO,),
    ),
    "sft_epochs": _only(
        _number(1, 1, 100, "times the first stage sees each answer", whole=True), methods=(SFT_THEN_DPO,)
    ),
    "texts": _only(
        _folder("folder of .txt and .md files to read; null: texts/ in the data directory"),
        methods=(CONTINUED_PRETRAINING,),
    ),
    "dialogues": _only(
        _folder("folder of .jsonl or .parquet dialogues to imitate; null: dialogues/ in the data directory, if any"),
        methods=(SFT, SFT_THEN_DPO),
    ),
    "learning_rate": _number(1e-4, 1e-8, 1e-1, "peak learning rate of AdamW"),
    "lr_schedule": _choice("linear", ("linear", "cosine", "constant"), "how the learning rate falls"),
    "warmup_ratio": _number(0.05, 0, 0.5, "part of the steps that warm up; rounded down, so short runs have none"),
    "max_grad_norm": _number(1.0, 1e-3, 1e3, "gradients are clipped to this norm"),
    "batch_size": _number(8, 1, 4096, "rows a step, over all processes: pairs, rated answers or texts", whole=True),
    "micro_batch_size": _number(
        2, 1, 4096, "rows in memory at once, per process, without the fast step; KTO needs 2", whole=True
    ),
    "tokens_per_batch": _only(
        _optional(None, 16, 10**7, "the fast step's tokens in memory; null: by device", whole=True), methods=_ON_PAIRS
    ),
    "fast_step": _only(
        _choice("auto", ("auto", "off"), "auto: each piece of work once where that is exact; off: TRL's step"),
        methods=_ON_PAIRS,
    ),
    "epochs": _number(1, 1, 100, "times each row is seen", whole=True),
    "max_steps": _optional(None, 1, 10**9, "a cap on the steps, of each stage", whole=True),
    "max_length": _number(1024, 16, 131072, "tokens of prompt and answer; longer answers are cut", whole=True),
    "held_out_pairs": _number(40, 0, 100000, "cap on the pairs of the evaluation", whole=True),
    "edits": _switch(True, "learn from people's rewrites of answers"),
    "retries": _switch(False, "learn, weakly, from the answer people kept after asking again"),
    "replay_ratio": _optional(None, 0, 1e6, "imported rows for each of our own; null: all of them"),
    "max_rater_share": _optional(0.5, 1e-3, 1, "the largest part of the rated rows that one person may have"),
    "rater_weights": _only(
        _choice(OFF, RATER_WEIGHTS, "agreement: rows weigh what agreement and gold pairs say of their rater"),
        methods=_ON_PAIRS,
    ),
    "max_per_prompt": _optional(8, 1, 10**6, "rows on nearly the same prompt", whole=True),
    "eval_every_steps": _optional(None, 0, 1e9, "validate every so many steps; 0: never, null: if cheap", whole=True),
    "early_stop_patience": _optional(3, 1, 1000, "validations below the best that stop; null: go on", whole=True),
    "precision": _choice("auto", ("auto", "fp32", "bf16"), "auto: fp32 on CPU, bf16 on a GPU"),
    "save_every_steps": _optional(None, 1, 10**9, "a checkpoint so often; null: for 5% of the time", whole=True),
    "deadline_minutes": _optional(None, 0.01, 1e6, "stop the run after so long, its checkpoint kept; null: never"),
    "retry_half_batch": _switch(False, "out of memory: try again with half the micro batch, down to one pair"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. The names and meanings are those of `FIELDS`."""

    name: str
    about: str
    method: str
    tuning: str
    lora_rank: int
    lora_alpha: float
    beta: float
    sft_learning_rate: float
    sft_epochs: int
    texts: str | None
    dialogues: str | None
    loss: str
    label_smoothing: float
    sft_weight: float
    learning_rate: float
    lr_schedule: str
    warmup_ratio: float
    max_grad_norm: float
    batch_size: int
    micro_batch_size: int
    tokens_per_batch: int | None
    fast_step: str
    epochs: int
    max_steps: int | None
    max_length: int
    held_out_pairs: int
    edits: bool
    retries: bool
    replay_ratio: float | None
    max_rater_share: float | None
    rater_weights: str
    max_per_prompt: int | None
    eval_every_steps: int | None
    early_stop_patience: int | None
    precision: str
    save_every_steps: int | None
    deadline_minutes: float | None
    retry_half_batch: bool

    def as_dict(self) -> dict[str, Any]:
        """Every key that applies with its value, `name` left out: what `from_mapping` reads back."""
        return {key: value for key, value in asdict(self).items() if key != "name" and self._has(key)}

    def _has(self, key: str) -> bool:
        return self.method in FIELDS[key].methods and self.tuning in FIELDS[key].tunings

    @property
    def is_full(self) -> bool:
        """Whether a run makes a full checkpoint instead of an adapter."""
        return self.tuning == FULL

    def stages(self) -> list[Recipe]:
        """The recipe of each stage in order: itself, but two of a method each for `sft-then-dpo`."""
        if self.method != SFT_THEN_DPO:
            return [self]
        first = replace(self, method=SFT, learning_rate=self.sft_learning_rate, epochs=self.sft_epochs)
        return [first, replace(self, method=DPO)]

    @property
    def takes_fast_step(self) -> bool:
        """Whether `dpo_trainer.py` may take its own step."""
        return self.method in _ON_PAIRS and self.fast_step == "auto"

    def halved(self, times: int) -> Recipe:
        """The same steps with less in memory at once: micro batch and tokens halved so many times, down to one pair."""
        if times == 0:
            return self
        least = 2 if self.method == KTO else 1
        smaller = replace(self, micro_batch_size=max(least, self.micro_batch_size >> times))
        if not self.takes_fast_step:
            return smaller
        tokens = self.tokens_per_batch or TOKENS["cpu"]
        return replace(smaller, tokens_per_batch=max(min(FEWEST_TOKENS, tokens), tokens >> times))

    def mix(self, seed: int) -> Mix:
        """Which preferences a snapshot for this recipe takes."""
        return Mix(
            edits=self.edits,
            retries=self.retries,
            replay_ratio=self.replay_ratio,
            max_rater_share=self.max_rater_share,
            max_per_prompt=self.max_per_prompt,
            seed=seed,
            learns_from=_LEARNS_FROM.get(self.method, PAIRS),
            rater_weights=self.rater_weights,
        )

    def total_steps(self, rows: int, max_steps: int | None = None) -> int:
        """Optimizer steps of one stage on `rows` rows; the smaller of the run's and the recipe's caps applies."""
        caps = [cap for cap in (self.max_steps, max_steps) if cap is not None]
        return min([self.epochs * math.ceil(rows / self.batch_size), *caps])

    def planned_steps(self, rows: int, max_steps: int | None = None) -> int:
        """Optimizer steps of all stages, where no row has to be dropped."""
        return sum(stage.total_steps(rows, max_steps) for stage in self.stages())

    def per_process_batch(self, num_processes: int) -> int:
        """Rows of one step on one process. Raises BadRecipe when the batch cannot be split evenly."""
        if self.batch_size % num_processes:
            raise BadRecipe(
                f"Recipe {self.name}: batch_size {self.batch_size} cannot be split over {num_processes} processes. "
                f"Use a number of processes that divides {self.batch_size}."
            )
        return self.batch_size // num_processes

    def micro_batch(self, num_processes: int) -> int:
        """Rows in memory at once on one process: the largest part of its batch that micro_batch_size allows evenly.

        Raises BadRecipe where that is too small for the method.
        """
        micro = math.gcd(self.micro_batch_size, self.per_process_batch(num_processes))
        if self.method == KTO and micro < 2:
            raise BadRecipe(
                f"Recipe {self.name}: KTO needs 2 rated answers at once, but batch_size {self.batch_size} over "
                f"{num_processes} processes in parts of micro_batch_size {self.micro_batch_size} leaves 1. "
                "Use fewer processes or a batch_size that is a multiple of 2 for each."
            )
        return micro


def recipe_names(own: Path | None = None) -> list[str]:
    """Names of the recipes that ship with the package, and of those in `own`, a folder that need not exist."""
    folders = [RECIPES] if own is None else [RECIPES, own]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_recipe(name: str, own: Path | None = None) -> Recipe:
    """The recipe called `name`, or the one in the file of `own` with this path. Raises UnknownRecipe, BadRecipe."""
    if own is not None and name.endswith(".yaml") and Path(name).absolute().parent == own.absolute():
        name = Path(name).stem
    if name not in recipe_names(own):
        places = "" if own is None else f" Your own belong in {own}, one YAML file each."
        raise UnknownRecipe(f"There is no recipe {name!r}. Recipes: {', '.join(recipe_names(own))}.{places}")
    shipped, mine = RECIPES / f"{name}.yaml", None if own is None else own / f"{name}.yaml"
    if shipped.is_file() and mine is not None and mine.is_file():
        raise BadRecipe(f"Recipe {name}: {mine} has the name of a recipe that ships. Give the file another name.")
    path = shipped if shipped.is_file() else mine
    assert path is not None
    try:
        values = load_yaml(path) or {}
    except (OSError, ValueError) as error:
        raise BadRecipe(f"Recipe {name}: {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise BadRecipe(f"Recipe {name}: {path} must hold `key: value` lines, it holds a {type(values).__name__}.")
    return from_mapping(name, values)


def from_mapping(name: str, values: Mapping[str, Any]) -> Recipe:
    """Check `values` against `FIELDS`, fill in defaults. Raises BadRecipe naming the key, the value and the limit."""
    unknown = sorted(str(key) for key in set(values) - set(FIELDS))
    if unknown:
        raise BadRecipe(f"Recipe {name}: unknown key {unknown[0]!r}. Known keys: {', '.join(FIELDS)}.")
    recipe = Recipe(name=name, **{key: _checked(name, key, values.get(key, f.default)) for key, f in FIELDS.items()})
    for key in values:
        _require_applies(recipe, key)
    _check_together(recipe)
    return recipe


def _require_applies(recipe: Recipe, key: str) -> None:
    field, name = FIELDS[key], recipe.name
    if recipe.method not in field.methods:
        raise BadRecipe(
            f"Recipe {name}: {key} has no meaning for method {recipe.method}, only for {', '.join(field.methods)}. "
            "Remove the line."
        )
    if recipe.tuning not in field.tunings:
        raise BadRecipe(
            f"Recipe {name}: {key} has no meaning for tuning {recipe.tuning}, only for {', '.join(field.tunings)}. "
            "Remove the line."
        )


def _check_together(recipe: Recipe) -> None:
    if recipe.method == KTO and (recipe.micro_batch_size < 2 or recipe.batch_size < 2):
        raise BadRecipe(
            f"Recipe {recipe.name}: KTO measures each answer against others of its micro batch: batch_size and "
            f"micro_batch_size must be 2 or more, they are {recipe.batch_size} and {recipe.micro_batch_size}."
        )
    if recipe.method == SFT_THEN_DPO and recipe.tuning == QLORA:
        raise BadRecipe(
            f"Recipe {recipe.name}: sft-then-dpo cannot be tuned with qlora: the first stage is merged into the base, "
            "which is not exact in 4 bits. Use tuning lora or full."
        )


def _checked(name: str, key: str, value: Any) -> Any:
    field = FIELDS[key]
    wrong_type = not isinstance(value, field.types) or (isinstance(value, bool) and bool not in field.types)
    if wrong_type or not field.check(value):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) and "e-" in value else ""
        raise BadRecipe(f"Recipe {name}: {key} is {value!r}, it must be {field.allowed}{hint}.")
    return value
