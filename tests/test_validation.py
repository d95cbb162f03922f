"""Rows kept aside while a run learns: chosen by their prompts, scored as DPO scores them, and the run stops in time."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from made_run import made_run
from safetensors.torch import save_file
from transformers import AutoTokenizer

from feedback_store.durable import write_json
from feedback_store.preferences import prompt_key
from feedback_store.records import Preference
from feedback_store.snapshots import freeze, load_preferences
from trainer.cycle import Plan, plan_run
from trainer.launch import is_alive, kill_tree, start_training
from trainer.methods.dpo import choose_rows
from trainer.progress import Progress
from trainer.recipe import Recipe, from_mapping, load_recipe
from trainer.runs import Run
from trainer.validation import (
    ACCURACY,
    LOSS,
    MARGINS,
    BestWeights,
    EarlyStop,
    Validation,
    rewards,
    set_aside,
    steps_between,
)

SEED = 7
RECIPE = from_mapping(
    "mine",
    {
        "learning_rate": 3e-3,
        "lr_schedule": "constant",
        "batch_size": 4,
        "max_length": 256,
        "eval_every_steps": 2,
        "early_stop_patience": 2,
    },
)


def line(step: int, accuracy: float, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, ACCURACY: accuracy, LOSS: loss, MARGINS: 0.0}


def seen(patience: int | None, *accuracies: float) -> EarlyStop:
    stop = EarlyStop(patience)
    for step, accuracy in enumerate(accuracies, 1):
        stop.see(line(step, accuracy))
    return stop


def test_it_stops_after_so_many_validations_below_the_best() -> None:
    assert not seen(2, 0.5, 0.7, 0.6).is_due
    stop = seen(2, 0.5, 0.7, 0.6, 0.65)
    assert stop.is_due
    assert (stop.best_step, stop.best) == (2, (0.7, 0.5))


def test_a_plateau_or_a_recovery_goes_on() -> None:
    assert not seen(2, 0.7, 0.7, 0.7, 0.7).is_due
    assert not seen(2, 0.7, 0.6, 0.7, 0.6).is_due
    assert not seen(None, 0.7, 0.1, 0.1, 0.1).is_due


def test_of_equal_accuracies_the_lower_loss_is_the_best() -> None:
    stop = EarlyStop(3)
    for one in (line(1, 0.6, 0.6), line(2, 0.6, 0.5), line(3, 0.6, 0.55)):
        stop.see(one)
    assert stop.best_step == 2
    assert not stop.last_is_best


def test_the_same_prompts_are_set_aside_every_time_and_never_split() -> None:
    made = tiny_model.made_up_preferences(60)
    made += [replace(one, preference_id=f"{one.preference_id}_again", chosen=f"{one.chosen} red") for one in made[:30]]
    kept, aside = set_aside(made, RECIPE, None)
    assert 0 < len(aside) <= 9
    assert len(kept) + len(aside) == 90
    assert not {prompt_key(one.prompt) for one in kept} & {prompt_key(one.prompt) for one in aside}
    assert {one.preference_id for one in set_aside(made[::-1], RECIPE, None)[1]} == {one.preference_id for one in aside}


def test_by_default_small_runs_lose_no_row_and_large_ones_spend_little() -> None:
    default = load_recipe("dpo-lora")
    small = tiny_model.made_up_preferences(200)
    assert set_aside(small, default, None) == (small, [])
    assert steps_between(default, 1000, None) is None
    assert steps_between(default, 100_000, max_steps=50) is None
    for rows in (1600, 5000, 60_000):
        every = steps_between(default, rows, None)
        assert every is not None
        validations = math.ceil(math.ceil(rows / 8) / every)
        assert 4 <= validations <= 20
        assert validations * 40 * 0.5 <= 0.055 * rows
    assert steps_between(replace(default, eval_every_steps=0), 60_000, None) is None


def test_the_loss_is_dpos() -> None:
    assert rewards([3.0, -2.0], [3.0, -2.0], 0.1) == {LOSS: pytest.approx(math.log(2)), ACCURACY: 0.0, MARGINS: 0.0}
    found = rewards([10.0, -5.0], [0.0, 0.0], 0.1)
    assert found[MARGINS] == pytest.approx(0.25)
    assert found[ACCURACY] == 0.5
    assert found[LOSS] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 2)


def test_the_best_weights_come_back_and_old_ones_go(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    best = BestWeights(tmp_path / "best")
    first = model.weight.detach().clone()
    best.save(model, 2)
    with torch.no_grad():
        model.weight += 1
        model.bias += 1
    bias = model.bias.clone()
    best.save(model, 4)
    assert [path.name for path in best._directory.iterdir()] == ["step_4.safetensors"]
    best.keep_from = 4  # a checkpoint: a killed run goes back here
    with torch.no_grad():
        model.weight += 1
    for step in (6, 8):
        best.save(model, step)
    assert sorted(path.name for path in best._directory.iterdir()) == ["step_4.safetensors", "step_8.safetensors"]
    best.forget_after(4)
    best.restore(model, 4)
    assert torch.equal(model.weight, first + 1)
    assert torch.equal(model.bias, bias), "only what is tuned is kept"


def test_a_resumed_run_knows_its_reference_and_its_best(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    pairs = tiny_model.made_up_preferences(2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.shared_directory())

    def validation() -> Validation:
        progress = Progress(run, is_main=True)
        return Validation(run, RECIPE, pairs, every=8, rows=182, tokenizer=tokenizer, progress=progress)

    (run.directory / "best").mkdir()
    for step in (8, 24):
        save_file({}, run.directory / "best" / f"step_{step}.safetensors")
    write_json(run.directory / "validation.json", {"reference": [1.5, -2.0]})
    resumed = validation()
    resumed.begin(None, 16)  # what is read from files needs no model
    assert resumed._reference == [1.5, -2.0]
    assert resumed.facts["best_step"] == 16
    assert [path.name for path in (run.directory / "best").iterdir()] == ["step_8.safetensors"]

    (run.directory / "validation.json").unlink()
    lost = validation()
    lost.begin(None, 16)
    before = run.metrics()
    lost.validate(None, 18)
    assert run.metrics() == before, "without a reference nothing can be said"


def turning(recipe: Recipe, directory: Path) -> list[Preference]:
    """Made-up preferences for shorter answers that turn round after three steps: then what was right gets wrong.

    Those set aside stay as they are.
    """
    rows = load_preferences(freeze(tiny_model.made_up_preferences(70), directory, None).train_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.shared_directory())
    kept, aside = set_aside(rows, recipe, None)
    order, _ = choose_rows(kept, recipe, None, SEED, tokenizer)
    turned = {one.preference_id for one in order[3 * recipe.batch_size :]}
    assert aside
    return [
        replace(one, chosen=one.rejected, rejected=one.chosen) if one.preference_id in turned else one for one in rows
    ]


def trained(data: Path, preferences: list[Preference], num_processes: int) -> Run:
    snapshot = freeze(preferences, data / "snapshots", None)
    plan = Plan(RECIPE, None, num_processes, seed=SEED, practice=None, device="cpu", requested_by="test")
    run = plan_run(plan, snapshot, tiny_model.shared_tiny(), data)
    child = start_training(run.directory, num_processes=num_processes)
    deadline = time.monotonic() + 600
    try:
        while is_alive(child.pid, child.start_time):
            assert time.monotonic() < deadline, "\n".join(run.log_tail(30))
            time.sleep(0.1)
    finally:
        kill_tree(child.pid, child.start_time, run.directory)
    return run


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_gets_worse_on_what_it_does_not_see_stops_and_goes_back(tmp_path: Path, num_processes: int) -> None:
    from safetensors.numpy import load_file

    tiny_model.lend_models(tmp_path)
    run = trained(tmp_path, turning(RECIPE, tmp_path / "before"), num_processes)
    training = run.training
    assert training is not None, "\n".join(run.log_tail(30))
    steps = [one["step"] for one in run.metrics() if "loss" in one]
    validations = [one for one in run.metrics() if ACCURACY in one]
    assert validations
    facts = training["validation"]
    assert facts["stopped_at"] == training["steps"] == steps[-1] < run.config.snapshot["planned_steps"]
    best = max(validations, key=lambda one: (one[ACCURACY], -one[LOSS]))
    assert facts["best_step"] == best["step"] < facts["stopped_at"]
    assert best[ACCURACY] > validations[-1][ACCURACY]
    kept = load_file(run.directory / "best" / f"step_{best['step']}.safetensors")
    adapter = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    assert len(kept) == len(adapter) == 14 * tiny_model.LAYERS
    for name, tensor in adapter.items():
        assert (tensor == kept[name.replace(".weight", ".default.weight")]).all(), name
    assert run.as_body()["metrics"]["loss"] > 0
    assert run.as_body()["metrics"][ACCURACY] == validations[-1][ACCURACY]
