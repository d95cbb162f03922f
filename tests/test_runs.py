"""The run directory: whole or not there, one story of states, and a body the API can send."""

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from feedback_store.durable import new_directory, read_json, write_json
from trainer.errors import BadRecipe, RunNotFound, UnknownRecipe
from trainer.recipe import FIELDS, from_mapping, load_recipe, recipe_names
from trainer.runs import Run, RunConfig, RunState, list_runs, new_run_id


def config(**changes: Any) -> RunConfig:
    recipe = load_recipe("dpo-lora")
    made = RunConfig(
        run_id=new_run_id(datetime(2026, 11, 22, 23, 15, tzinfo=UTC)),
        created_at="2026-11-22T23:15:00.000+00:00",
        recipe=recipe.as_dict(),
        recipe_name=recipe.name,
        seed=0,
        num_processes=1,
        max_steps=None,
        practice=None,
        base={"name": "tiny", "gguf": "/nowhere.gguf", "directory": None},
        models_dir="/nowhere",
        snapshot={"hash": "abc", "directory": "/nowhere", "planned_steps": 4},
        device="cpu",
        requested_by="test",
    )
    return replace(made, **changes)


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, "time": 100.0 + 10 * step, "pairs": 8 * step, "loss": 0.6, **values}) + "\n"


def test_a_new_run_is_queued_and_found_again(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    assert run.state is RunState.QUEUED
    assert run.is_active
    again = Run.open(tmp_path, run.run_id)
    assert again.config == run.config
    assert again.run_id.startswith("run_20261122-231500_")


@pytest.mark.parametrize("run_id", ["run_unknown", "../runs", "", "."])
def test_a_run_that_is_not_there(tmp_path: Path, run_id: str) -> None:
    Run.create(tmp_path, config())
    with pytest.raises(RunNotFound):
        Run.open(tmp_path, run_id)


def test_newest_first(tmp_path: Path) -> None:
    old = Run.create(tmp_path, config(created_at="2026-11-22T23:15:00.000+00:00"))
    new = Run.create(tmp_path, config(run_id="run_20261123-000000_0000", created_at="2026-11-23T00:00:00.000+00:00"))
    (tmp_path / "run_broken_off").mkdir()
    assert [run.run_id for run in list_runs(tmp_path)] == [new.run_id, old.run_id]


def test_the_story_goes_one_way(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    for state in (RunState.PREPARING, RunState.TRAINING, RunState.EVALUATING):
        run.move(state)
    run.end(RunState.FINISHED, version="v1")
    assert run.is_finished
    assert not run.is_active
    assert run.version == "v1"
    with pytest.raises(AssertionError):
        run.move(RunState.TRAINING)
    other = Run.create(tmp_path, config(run_id="run_20261123-000000_0000"))
    with pytest.raises(AssertionError):
        other.move(RunState.FINISHED)


def test_a_reader_never_sees_half_a_state(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    run.move(RunState.PREPARING)
    stop = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(Run.open(tmp_path, run.run_id).record["state"])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        run.note(number=number)
    stop.set()
    reader.join()
    assert set(seen) == {"preparing"}


def test_the_body_while_it_trains(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    body = run.as_body()
    assert (body["state"], body["step"], body["total_steps"], body["eta_s"]) == ("queued", 0, 4, None)
    assert body["metrics"] == {}
    assert (body["version"], body["verdict"], body["error"], body["evaluation"]) == (None, None, None, None)

    run.move(RunState.PREPARING)
    run.move(RunState.TRAINING)
    write_json(run.directory / "progress.json", {"stage": "training", "since": 100.0, "total_steps": 10, "time": 120.0})
    (run.directory / "metrics.jsonl").write_text(line(1) + line(2, **{"rewards/margins": 0.5}) + line(3)[:-20])
    body = run.as_body()
    assert (body["step"], body["total_steps"], body["eta_s"]) == (2, 10, 80.0)
    assert body["metrics"] == {"pairs": 16, "loss": 0.6, "rewards/margins": 0.5}
    assert json.loads(json.dumps(body)) == body


def test_the_body_while_it_evaluates(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    run.move(RunState.PREPARING)
    run.move(RunState.EVALUATING, champion="v0")
    progress = {"stage": "evaluating", "since": 100.0, "time": 120.0, "evaluation": {"done": 10, "total": 40}}
    write_json(run.directory / "progress.json", progress)
    body = run.as_body()
    assert body["champion"] == "v0"
    assert body["evaluation_progress"] == {"done": 10, "total": 40}
    assert body["eta_s"] == 60.0


def test_the_end_of_the_log(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    assert run.log_tail(3) == []
    (run.directory / "log.txt").write_bytes(b"one\n\ntwo\n\xff three\nfour\n")
    assert run.log_tail(2) == ["� three", "four"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(target: Path) -> None:
        with new_directory(target) as directory:
            (directory / "half").write_text("x")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        half(tmp_path / "v1")
    assert list(tmp_path.iterdir()) == []
    assert read_json(tmp_path / "nothing.json") is None


def test_recipes_that_ship_are_valid_and_documented() -> None:
    assert {"dpo-lora", "practice"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert from_mapping(name, recipe.as_dict()) == recipe
    assert all(field.about for field in FIELDS.values())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'"),
        ({"learning_rate": "1e-4"}, "write 1.0e-4"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"lora_rank": True}, "lora_rank is True"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"precision": "fp8"}, "one of auto, fp32, bf16"),
    ],
)
def test_a_bad_recipe_names_key_value_and_limit(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecipe, match=said.replace(".", r"\.")):
        from_mapping("mine", values)


def test_unknown_recipes_list_the_known() -> None:
    with pytest.raises(UnknownRecipe, match=r"dpo-lora, .*practice"):
        load_recipe("ppo")


def test_steps_and_batches() -> None:
    recipe = from_mapping("mine", {"batch_size": 8, "epochs": 2, "max_steps": 10})
    assert recipe.total_steps(rows=17) == 6
    assert recipe.total_steps(rows=1000) == 10
    assert recipe.total_steps(rows=1000, max_steps=3) == 3
    assert recipe.per_process_batch(2) == 4
    with pytest.raises(BadRecipe, match="3 processes"):
        recipe.per_process_batch(3)
