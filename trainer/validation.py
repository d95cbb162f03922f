"""Part of the train rows kept aside while a run learns: `eval/…` lines in metrics.jsonl, and an early stop.

    train rows --set_aside--> rows to learn from + validation rows (whole prompts)
    every N steps: validate → metrics.jsonl → EarlyStop → stop, and go back to the best weights

Never the held-out part: a run that stops where the held-out pairs like it best would be judged on pairs it was chosen
by (the verdict would be too kind). The rows come out of `train`, whole prompts, chosen by a hash of the prompt, are not
learned from, and are named in training.json. `eval/rewards/*` are DPO's implicit rewards: beta times the change of the
log-probability since the first step, which is the reference whatever is tuned.

By default it is on where it costs at most about a twentieth of the training, which takes some 1,600 pairs.
Not covered: weights that are sharded over processes (FSDP, ZeRO-3): there no validation takes place, and the log says
so. A run that goes to its end keeps its last weights: the best of many noisy looks is no better than the last one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, sync, write_json
from feedback_store.preferences import prompt_key
from feedback_store.records import Preference
from trainer.progress import Progress, pairs_seen
from trainer.recipe import Recipe
from trainer.runs import BEST, Run
from trainer.scorer import score_pair
from trainer.tokens import tokenise

MAX_PAIRS = 40
MAX_SHARE = 0.1  # of the rows
COST_SHARE = 0.05  # of the training, where the recipe leaves it to us
FORWARD_SHARE = 0.5  # scoring a pair next to learning from it, with an adapter
FEWEST, MOST = 4, 20  # validations a run, where the recipe leaves it to us
ACCURACY, MARGINS, LOSS = "eval/rewards/accuracies", "eval/rewards/margins", "eval/loss"


def steps_between(recipe: Recipe, rows: int, max_steps: int | None) -> int | None:
    """Steps from one validation to the next on `rows` train rows; None: there is none."""
    if recipe.eval_every_steps is not None:
        return recipe.eval_every_steps or None
    steps = recipe.total_steps(rows, max_steps)
    affordable = int(COST_SHARE / FORWARD_SHARE * steps * recipe.batch_size / MAX_PAIRS)
    return None if affordable < FEWEST else math.ceil(steps / min(affordable, MOST))


def set_aside(
    preferences: Sequence[Preference], recipe: Recipe, max_steps: int | None
) -> tuple[list[Preference], list[Preference]]:
    """The rows to learn from and the rows to validate on, no prompt in both; the latter may be empty.

    Whole prompts in the order of a hash of theirs, up to 40 rows and a tenth of all: the same rows give the same part.
    """
    wanted = min(MAX_PAIRS, int(MAX_SHARE * len(preferences)))
    if steps_between(recipe, len(preferences), max_steps) is None or wanted == 0:
        return list(preferences), []
    keys = [_place(preference) for preference in preferences]
    aside: set[str] = set()
    rows = 0
    for key, count in sorted(Counter(keys).items()):
        if rows + count <= wanted:
            aside.add(key)
            rows += count
    kept = [one for one, key in zip(preferences, keys, strict=True) if key not in aside]
    return kept, [one for one, key in zip(preferences, keys, strict=True) if key in aside]


def _place(preference: Preference) -> str:
    """Another hash than the one that makes the held-out part, so that one says nothing of the other."""
    return hashlib.sha256(f"validation {prompt_key(preference.prompt)}".encode()).hexdigest()


@dataclass(slots=True)
class EarlyStop:
    """When to stop: `patience` validations in a row with an accuracy below the best one. Pure.

    The best is the highest accuracy, of equal ones the lowest loss.
    """

    patience: int | None
    best: tuple[float, float] | None = None
    best_step: int | None = None
    below: int = 0
    last_is_best: bool = field(default=False)

    def see(self, line: Mapping[str, Any]) -> None:
        """One more validation."""
        accuracy, loss = float(line[ACCURACY]), float(line[LOSS])
        self.last_is_best = self.best is None or (accuracy, -loss) > (self.best[0], -self.best[1])
        self.below = self.below + 1 if self.best is not None and accuracy < self.best[0] else 0
        if self.last_is_best:
            self.best, self.best_step = (accuracy, loss), int(line["step"])

    @property
    def is_due(self) -> bool:
        return self.patience is not None and self.below >= self.patience


class Validation:
    """The validation of one run; `facts` go into training.json."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        pairs: Sequence[Preference],
        *,
        every: int,
        rows: int,
        tokenizer: Any,
        progress: Progress,
    ) -> None:
        """`every`: steps from one validation to the next; `rows`: how many are learned from."""
        self._run = run
        self._recipe = recipe
        self._pairs = pairs
        self._every = every
        self._rows = rows
        self._progress = progress
        tokens = [tokenise(tokenizer, pair, recipe.max_length) for pair in pairs]
        self._tokens = [one for one in tokens if one.chosen and one.rejected]
        self._reference: list[float] = []
        self._stop = EarlyStop(recipe.early_stop_patience)
        self._best = BestWeights(run.directory / BEST)
        self._steps_before = self._rows_before = 0
        self.stopped_at: int | None = None  # in steps of the trainer

    @property
    def facts(self) -> dict[str, Any]:
        """What training.json says of it."""
        return {
            "pairs": len(self._tokens),
            "every_steps": self._every,
            "prompts": sorted({prompt_key(pair.prompt) for pair in self._pairs}),
            "best_step": self._stop.best_step,
            "stopped_at": None if self.stopped_at is None else self._steps_before + self.stopped_at,
        }

    def add_to(self, trainer: Any, *, steps_before: int = 0, rows_before: int = 0) -> None:
        """Add the callback, after the one that writes the steps; not where weights are sharded.

        `…_before` is what earlier trainings of the run have done.
        """
        from transformers import TrainerCallback

        self._steps_before, self._rows_before = steps_before, rows_before

        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            self._tokens = []
            print("Validation is left out: the weights are sharded over processes.")
            return
        validation = self

        class Validate(TrainerCallback):  # type: ignore[misc]
            """Validates after each N-th step's line."""

            def on_train_begin(self, _args: Any, state: Any, _control: Any, model: Any, **_kwargs: Any) -> None:
                validation.begin(model, int(state.global_step))

            def on_log(self, _args: Any, state: Any, control: Any, logs: Any, model: Any, **_kwargs: Any) -> None:
                step = int(state.global_step)
                if "loss" in logs and (step % validation._every == 0 or step == state.max_steps):
                    validation.validate(model, step)
                    control.should_training_stop |= validation.stopped_at is not None

            def on_save(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
                validation._best.keep_from = steps_before + int(state.global_step)

        trainer.add_callback(Validate())

    def begin(self, model: Any, step: int) -> None:
        """Score the reference, or, where a training goes on at `step`, take up what was scored and seen before."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        path = self._run.directory / "validation.json"
        known = broadcast_object_list([read_json(path)])[0]  # one looks: the first to be done writes it
        if known is not None and len(known["reference"]) == len(self._tokens):
            self._reference = known["reference"]
        elif step == 0:
            self._reference = self._scores(model)
            if PartialState().is_main_process:
                write_json(path, {"reference": self._reference})
        else:
            self._tokens = []
            print("Validation is left out: the run is resumed without validation.json, the reference is not known.")
        for line in self._run.metrics():
            if ACCURACY in line and self._steps_before < line["step"] <= self._steps_before + step:
                self._stop.see(line)
        self._best.forget_after(self._steps_before + step)

    def validate(self, model: Any, step: int) -> None:
        """One line of `eval/…`; sets `stopped_at` where it is time to stop, with the best weights back in `model`."""
        from accelerate import PartialState

        if not self._tokens:
            return
        began, at = time.monotonic(), self._steps_before + step
        line = {
            "step": at,
            "time": time.time(),
            "pairs": self._rows_before + pairs_seen(step, self._recipe.batch_size, self._rows),
            **rewards(self._scores(model), self._reference, self._recipe.beta),
        }
        self._progress.step({**line, "eval/seconds": round(time.monotonic() - began, 3)})
        self._stop.see(line)
        if self._stop.last_is_best and self._recipe.early_stop_patience is not None:
            self._best.save(model, at)
        if self._stop.is_due and self._stop.best_step is not None:
            PartialState().wait_for_everyone()
            self._best.restore(model, self._stop.best_step)
            self.stopped_at = step
            print(
                f"Stopped early at step {at}: {self._stop.below} validations in a row were below the accuracy of "
                f"step {self._stop.best_step}, whose weights are kept."
            )

    def _scores(self, model: Any) -> list[float]:
        """How far `model` favours `chosen`, in nats, for each pair; the same on every process."""
        from accelerate.utils import broadcast_object_list

        was_training = model.training
        model.eval()
        scores = [score_pair(model, tokens, model.device).favour for tokens in self._tokens]
        model.train(was_training)
        return list(broadcast_object_list(scores))  # processes must not come to stop at different steps


def rewards(policy: Iterable[float], reference: Iterable[float], beta: float) -> dict[str, float]:
    """`eval/…` from how far policy and reference favour `chosen`, in nats: DPO's sigmoid loss, accuracy, margin."""
    margins = [beta * (one - other) for one, other in zip(policy, reference, strict=True)]
    return {
        LOSS: sum(math.log1p(math.exp(-abs(margin))) + max(0.0, -margin) for margin in margins) / len(margins),
        ACCURACY: sum(margin > 0 for margin in margins) / len(margins),
        MARGINS: sum(margins) / len(margins),
    }


class BestWeights:
    """The tuned weights of the best validation so far, one file each, in RUN_DIR/best.

    Written by the main process. Kept: the newest one, and the newest one that is not after the last checkpoint
    (`keep_from`), to which a killed run goes back.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.keep_from = 0

    def save(self, model: Any, step: int) -> None:
        from accelerate import PartialState
        from safetensors.torch import save_file

        if not PartialState().is_main_process:
            return
        self._directory.mkdir(exist_ok=True)
        temporary = self._directory / f".step_{step}"
        save_file({name: one.detach().cpu().contiguous() for name, one in _tuned(model)}, temporary)
        sync(temporary)
        temporary.replace(self._path(step))
        steps = self._steps()
        kept = {steps[-1], max((one for one in steps if one <= self.keep_from), default=steps[-1])}
        for one in set(steps) - kept:
            self._path(one).unlink()

    def restore(self, model: Any, step: int) -> None:
        """Put the weights of `step` back into `model`, on every process."""
        import torch
        from safetensors.torch import load_file

        kept = load_file(self._path(step))
        with torch.no_grad():
            for name, one in _tuned(model):
                one.copy_(kept[name])

    def forget_after(self, step: int) -> None:
        """Remove what a run found after the step it is resumed at."""
        from accelerate import PartialState

        for one in self._steps():
            if one > step and PartialState().is_main_process:
                self._path(one).unlink()

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step_")) for path in self._directory.glob("step_*.safetensors"))

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step}.safetensors"


def _tuned(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
