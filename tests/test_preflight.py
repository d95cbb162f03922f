"""Before a run: what the files say of model and work, what fits, who gives way, and what earlier runs taught."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from feedback_store.durable import write_json
from feedback_store.snapshots import Snapshot, freeze
from trainer.base_model import BaseModel
from trainer.command import Launch
from trainer.cycle import Plan, plan_run
from trainer.errors import NotEnoughMemory
from trainer.preflight import Policy, Preflight, choose_policy, minutes, parts_of, preflight, shape_of
from trainer.recipe import load_recipe
from trainer.room import Room
from trainer.runs import Run, RunState
from trainer.supervisor import Supervisor, pause_of

GB = 10**9
ROOMY = Room(20 * GB, 24 * GB)


def plan(**changes: Any) -> Plan:
    values = {
        "recipe": load_recipe("dpo-lora"), "max_steps": None, "num_processes": 1, "seed": 0, "practice": None,
        "device": "cpu", "requested_by": "local",
    }  # fmt: skip
    return Plan(**{**values, **changes})


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return freeze(tiny_model.made_up_preferences(40), tmp_path / "snapshots", None)


def checked(snapshot: Snapshot, tmp_path: Path, asked: Plan | None = None, **changes: Any) -> Preflight:
    values = {"runs": [], "room": ROOMY, "policy": Policy.AUTO, "is_serving": True, "cores": 2}
    return preflight(
        asked or plan(), parts_of(snapshot), tiny_model.shared_tiny(), tmp_path / "models", **{**values, **changes}
    )  # fmt: skip


def test_the_shape_is_read_from_gguf_and_from_a_directory_alike(tmp_path: Path) -> None:
    directory = tiny_model.shared_directory()
    from_gguf = shape_of(tiny_model.shared_tiny(), tmp_path)
    assert from_gguf is not None
    assert from_gguf == shape_of(BaseModel("tiny", directory=directory), tmp_path)
    assert from_gguf.layers == tiny_model.LAYERS
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(40))
    assert shape_of(BaseModel("torn", gguf=tmp_path / "torn.gguf"), tmp_path) is None
    assert shape_of(BaseModel("far", hub_id="someone/far"), tmp_path) is None, "not downloaded yet"
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "config.json").write_text((directory / "config.json").read_text())
    assert shape_of(BaseModel("far", hub_id="someone/far"), tmp_path) == from_gguf
    (tmp_path / "far" / "config.json").write_text('{"model_type": "mamba"}')
    assert shape_of(BaseModel("far", hub_id="someone/far"), tmp_path) is None, "of a make that is not counted"


def test_the_work_is_that_of_the_run(snapshot: Snapshot, tmp_path: Path) -> None:
    whole = checked(snapshot, tmp_path).work
    assert whole is not None
    assert whole.pairs == snapshot.train_rows
    assert whole.held_out_pairs == snapshot.held_out_rows
    two_steps = checked(snapshot, tmp_path, plan(max_steps=2)).work
    assert two_steps is not None
    assert (two_steps.steps, two_steps.pairs) == (2, 16)
    assert two_steps.tokens == pytest.approx(whole.tokens * 16 / whole.pairs, abs=2)
    short = checked(snapshot, tmp_path, plan(recipe=replace(load_recipe("dpo-lora"), max_length=16))).work
    assert short is not None
    assert short.longest_rows == 2 * 16


def test_what_fits_is_said_with_numbers(snapshot: Snapshot, tmp_path: Path) -> None:
    found = checked(snapshot, tmp_path)
    assert (found.warning, found.refusal, found.policy) == (None, None, Policy.SHARE)
    assert found.sentence.endswith("GB of memory; 20.0 GB of 24.0 GB free.")
    assert json.loads(json.dumps(found.as_dict()))["estimate"]["total_s"] > 0


def test_near_the_limit_is_a_warning_and_beyond_is_a_refusal_with_what_to_change(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    estimate = checked(snapshot, tmp_path).estimate
    assert estimate is not None
    near = Room((estimate.memory_low_bytes + estimate.memory_high_bytes) // 2, 24 * GB)
    found = checked(snapshot, tmp_path, room=near)
    assert found.refusal is None
    assert found.warning is not None
    assert found.warning.startswith("This is near the limit")
    beyond = Room(estimate.memory_low_bytes - 1, 24 * GB)
    refusal = checked(snapshot, tmp_path, room=beyond).refusal
    assert refusal is not None
    assert "of 24.0 GB are free" in refusal
    assert "smaller micro_batch_size or max_length" in refusal
    assert "ZLOOP_DEVICE_POLICY=pause" in refusal
    assert "ZLOOP_DEVICE_POLICY" not in (checked(snapshot, tmp_path, room=beyond, is_serving=False).refusal or "")
    alone = checked(snapshot, tmp_path, room=beyond, policy=Policy.PAUSE)
    assert (alone.policy, alone.refusal) == (Policy.PAUSE, None)
    nowhere = Room(beyond.free_bytes, beyond.free_bytes)
    assert "and there are" in (checked(snapshot, tmp_path, room=nowhere, policy=Policy.PAUSE).refusal or "")
    strict = checked(snapshot, tmp_path, room=near, policy=Policy.REFUSE)
    assert "ZLOOP_DEVICE_POLICY=refuse" in (strict.refusal or "")
    assert checked(snapshot, tmp_path, room=near, policy=Policy.REFUSE, is_serving=False).refusal is None


def test_a_gpu_that_cannot_be_read_is_said_and_not_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    found = checked(snapshot, tmp_path, plan(device="gpu"), room=None)
    assert found.refusal is None
    assert "nvidia-smi" in (found.warning or "")


@pytest.mark.parametrize(
    ("policy", "device", "fits", "serving", "chosen"),
    [
        ("auto", "gpu", True, True, "share"),
        ("auto", "gpu", False, True, "pause"),
        ("auto", "gpu", False, False, "share"),
        ("auto", "cpu", False, True, "share"),
        ("share", "gpu", False, True, "share"),
        ("pause", "cpu", True, True, "pause"),
        ("pause", "cpu", True, False, "share"),
        ("refuse", "gpu", False, True, "share"),
    ],
)
def test_who_gives_way(
    snapshot: Snapshot, tmp_path: Path, policy: str, device: str, fits: bool, serving: bool, chosen: str
) -> None:
    estimate = checked(snapshot, tmp_path).estimate
    assert estimate is not None
    room = ROOMY if fits else Room(10, 24 * GB)
    assert choose_policy(Policy(policy), estimate, room, is_serving=serving, device=device) == chosen


def test_a_model_that_is_not_here_yet_is_no_obstacle(snapshot: Snapshot, tmp_path: Path) -> None:
    far = BaseModel("far", hub_id="someone/far")
    found = preflight(
        plan(), parts_of(snapshot), far, tmp_path, runs=[], room=ROOMY, policy=Policy.PAUSE, is_serving=True, cores=2
    )
    assert (found.estimate, found.refusal, found.policy) == (None, None, Policy.PAUSE)
    assert "the model is not here yet" in found.sentence


def ended(data: Path, snapshot: Snapshot, found: Preflight, times: float, *, resumed: bool = False) -> Run:
    """A run directory as one leaves it that took `times` the seconds the constants say."""
    assert found.estimate is not None
    run = plan_run(plan(), snapshot, tiny_model.shared_tiny(), data, preflight=found.as_dict())
    counted, began = found.estimate.counted, datetime.now(UTC) - timedelta(hours=1)
    lines = [{"step": step, "time": began.timestamp() + step, "loss": 0.7} for step in range(3 if resumed else 0, 5)]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_s = times * counted["training_s"]
    measured = {
        "peak_memory_bytes": int(counted["fixed_bytes"] + counted["activation_bytes"]), "loading_s": 9.0,
        "peak_device_memory_bytes": None, "training_s": training_s, "training_began": began.timestamp(),
        "ended": began.timestamp() + training_s,
    }  # fmt: skip
    write_json(run.directory / "training.json", {"steps": 5, "measured": measured})
    for state in (RunState.PREPARING, RunState.TRAINING, RunState.EVALUATING):
        run.move(state)
    run.end(RunState.FINISHED)
    return run


def test_earlier_runs_of_the_same_kind_teach(snapshot: Snapshot, tmp_path: Path) -> None:
    first = checked(snapshot, tmp_path)
    assert first.estimate is not None
    run = ended(tmp_path, snapshot, first, 7.0)
    second = checked(snapshot, tmp_path, runs=[run])
    assert second.estimate is not None
    assert second.estimate.learned_from == (run.run_id,)
    assert second.estimate.training_s == pytest.approx(7 * first.estimate.counted["training_s"], rel=0.01)
    two_processes = checked(snapshot, tmp_path, plan(num_processes=2), runs=[run]).estimate
    assert two_processes is not None
    assert two_processes.learned_from == ()
    partly = ended(tmp_path, snapshot, first, 0.1, resumed=True)
    assert checked(snapshot, tmp_path, runs=[partly, run]).estimate == second.estimate, "a resumed run tells no pace"

    body = run.as_body()["preflight"]
    assert body["actual"]["training_s"] == pytest.approx(7 * first.estimate.counted["training_s"])
    assert body["ratio"]["training_s"] == round(body["actual"]["training_s"] / body["training_s"], 2)
    assert body["ratio"]["memory_bytes"] == 1


def test_a_run_without_an_estimate_shows_none(snapshot: Snapshot, tmp_path: Path) -> None:
    assert plan_run(plan(), snapshot, tiny_model.shared_tiny(), tmp_path).as_body()["preflight"] is None
    waiting = plan_run(
        plan(), snapshot, tiny_model.shared_tiny(), tmp_path, preflight=checked(snapshot, tmp_path).as_dict()
    ).as_body()["preflight"]  # fmt: skip
    assert set(waiting["actual"].values()) == {None}


def test_the_supervisor_refuses_before_anything_is_made(snapshot: Snapshot, tmp_path: Path) -> None:
    asked: list[str] = []

    def room(device: str) -> Room:
        asked.append(device)
        return Room(10**6, 10**6)

    supervisor = Supervisor(
        tmp_path, tiny_model.shared_tiny(), lambda *_: snapshot, lambda: "v0", policy=Policy.SHARE, room=room
    )
    with pytest.raises(NotEnoughMemory, match="This run needs about"):
        supervisor.start_run()
    assert supervisor.runs() == []
    assert supervisor.preflight(lambda *_: parts_of(snapshot))["refusal"] is not None
    assert asked == ["cpu", "cpu"]


def test_people_read_when_chat_comes_back(snapshot: Snapshot, tmp_path: Path) -> None:
    found = checked(snapshot, tmp_path, policy=Policy.PAUSE)
    assert found.estimate is not None
    run = plan_run(plan(), snapshot, tiny_model.shared_tiny(), tmp_path, preflight=found.as_dict())
    why, left_s = pause_of(run)
    assert run.run_id in why
    assert found.estimate.total_s - 5 < left_s <= found.as_dict()["estimate"]["total_s"]
    assert [minutes(number) for number in (0.2, 80, 720, 9000)] == ["1 s", "80 s", "12 min", "2.5 h"]


@pytest.mark.parametrize("launcher", ["slurm", "ray"])
def test_the_memory_of_a_cluster_is_not_this_machine_s(snapshot: Snapshot, tmp_path: Path, launcher: str) -> None:
    little = Room(free_bytes=1, total_bytes=2)
    elsewhere = replace(plan(), launch=Launch(launcher))
    found = preflight(
        elsewhere, parts_of(snapshot), tiny_model.shared_tiny(), tmp_path, runs=[], room=little, policy=Policy.PAUSE,
        is_serving=True, cores=2,
    )  # fmt: skip
    assert (found.refusal, found.room, found.policy) == (None, None, Policy.SHARE)
    assert found.estimate is not None
    assert found.warning == f"What the machines of {launcher} have is not known, so it was not checked."
    here = preflight(
        plan(), parts_of(snapshot), tiny_model.shared_tiny(), tmp_path, runs=[], room=little, policy=Policy.SHARE,
        is_serving=True, cores=2,
    )  # fmt: skip
    assert here.refusal is not None
