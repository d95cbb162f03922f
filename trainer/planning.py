"""From a request to the plan of a run: recipe, launch, texts, everything checked that can be before anything is made.

    POST /v1/runs, `zloop train`, the schedule ─► Planner.plan(…) ─► Plan ─► cycle.plan_run

Called by `supervisor.py`. Not here: the snapshot, memory and disk (`preflight.py`, `disk.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from feedback_store.mixing import TEXT, Mix
from trainer.command import Launch, choose_launch
from trainer.cycle import Plan
from trainer.errors import BadRunRequest
from trainer.launch import check_training_available
from trainer.launchers import launcher_for
from trainer.recipe import (
    CONTINUED_PRETRAINING,
    DEFAULT,
    KTO,
    PRACTICE,
    SFT,
    SFT_THEN_DPO,
    Recipe,
    from_mapping,
    load_recipe,
)
from trainer.texts import DIALOGUES, TEXTS, find_dialogues, find_texts
from trainer.trackers import check_trackers
from trainer.tuning import check_tuning

MAX_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class Planner:
    """What a request leaves open: `launcher` and `strategy` of runs that name none, options of launchers by name."""

    data_dir: Path
    trackers: tuple[str, ...] = ()
    launcher: str = "local"
    strategy: str | None = None
    launcher_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_recipes(self) -> Path:
        """Where a team's own recipes lie."""
        return self.data_dir / "recipes"

    def plan(
        self,
        *,
        recipe: str | None = None,
        max_steps: int | None = None,
        num_processes: int | None = None,
        seed: int | None = None,
        practice: str | None = None,
        requested_by: str = "local",
        launcher: str | None = None,
        strategy: str | None = None,
        machines: int | None = None,
        deadline_minutes: float | None = None,
        without: Sequence[str] | None = None,
    ) -> Plan:
        """Check a request; `deadline_minutes` goes before the recipe's, rows of the raters `without` stay out.

        Raises UnknownRecipe, BadRecipe, BadRunRequest, TrainingUnavailable.
        """
        launch = self.launch(launcher=launcher, strategy=strategy, machines=machines, num_processes=num_processes)
        check_trackers(self.trackers)
        chosen = load_recipe(recipe or (PRACTICE if practice else DEFAULT), self.own_recipes)
        chosen = _with_deadline(chosen, deadline_minutes)
        check_tuning(chosen, launch.device)
        if practice and chosen.method in (KTO, CONTINUED_PRETRAINING):
            raise BadRunRequest(
                f"A practice taste gives pairs, and the recipe {chosen.name} does not learn from pairs. "
                "Practise with another recipe."
            )
        if practice and without:
            raise BadRunRequest(
                f"A practice has no raters to leave out, and it was asked to go without {len(without)}. "
                "Start a retrain, or practise without naming anybody."
            )
        chosen.micro_batch(launch.num_processes)
        return Plan(
            recipe=chosen,
            max_steps=_checked("max_steps", max_steps, 1, 1_000_000),
            num_processes=launch.num_processes,
            seed=_checked("seed", seed, 0, 2**32 - 1) or 0,
            practice=practice,
            device=launch.device,
            requested_by=requested_by,
            launch=launch,
            trackers=self.trackers,
            texts=self._texts(chosen),
            dialogues=None if practice else self._dialogues(chosen),
            without=tuple(sorted(set(without or ()))),
        )

    def launch(
        self,
        *,
        launcher: str | None = None,
        strategy: str | None = None,
        machines: int | None = None,
        num_processes: int | None = None,
    ) -> Launch:
        """How the children are started. Raises BadRunRequest, TrainingUnavailable."""
        check_training_available()
        launcher = launcher or self.launcher
        options = self.launcher_options.get(launcher, "")
        gpus = launcher_for(Launch(launcher, options=options)).gpus()
        wanted = _checked("num_processes", num_processes, 1, gpus or MAX_PROCESSES)
        processes = wanted or (max(1, gpus) if launcher == "local" else 1)
        return choose_launch(
            launcher,
            strategy or (self.strategy if processes > 1 else None),
            _checked("machines", machines, 1, MAX_PROCESSES),
            num_processes=processes,
            device="gpu" if gpus else "cpu",
            options=options,
        )

    def _texts(self, recipe: Recipe) -> dict[str, Any] | None:
        if recipe.method != CONTINUED_PRETRAINING:
            return None
        return find_texts(self.data_dir / TEXTS if recipe.texts is None else Path(recipe.texts))

    def _dialogues(self, recipe: Recipe) -> dict[str, Any] | None:
        if recipe.method not in (SFT, SFT_THEN_DPO):
            return None
        return find_dialogues(self.data_dir / DIALOGUES if recipe.dialogues is None else Path(recipe.dialogues))


def mix_of(plan: Plan) -> Mix:
    """Which rows the snapshot of a plan takes."""
    mix = replace(plan.recipe.mix(plan.seed), without=plan.without)
    if plan.dialogues and plan.recipe.method == SFT:
        mix = replace(mix, learns_from=TEXT)  # pairs are welcome, and not needed
    return mix


def _with_deadline(recipe: Recipe, minutes: float | None) -> Recipe:
    return recipe if minutes is None else from_mapping(recipe.name, {**recipe.as_dict(), "deadline_minutes": minutes})


def _checked(name: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise BadRunRequest(f"{name} is {value!r}, it must be a whole number from {low} to {high}.")
    return value
