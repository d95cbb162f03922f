"""The page: each stage looks first whether it is done, and a dead child's run says why in a person's words."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
from test_versions import VERDICT, trained_run

from feedback_store.durable import write_json
from feedback_store.snapshots import Snapshot, freeze
from trainer.cycle import (
    Plan,
    Surroundings,
    comparison,
    ensure_prepared,
    plan_run,
    reason_of_death,
    run_cycle,
    weights_of,
)
from trainer.errors import ChildFailed, TrainerError
from trainer.evaluate import count
from trainer.recipe import load_recipe
from trainer.runs import Run, RunState
from trainer.versions import Versions

KILLED = """
{'loss': '0.6931', 'grad_norm': '5.9'}
Traceback (most recent call last):
  File "/usr/lib/python3.11/runpy.py", line 88, in _run_code
    exec(code, run_globals)
subprocess.CalledProcessError: Command '['python', '-m', 'trainer.job']' died with <Signals.SIGKILL: 9>.
"""
CRASHED = """
W1122 torch/distributed/run.py:852] *****************************************
[rank0]: Traceback (most recent call last):
[rank0]:   File "/x/trainer/job.py", line 88, in train
[rank0]:     model = load()
[rank0]: RuntimeError: not enough memory: you tried to allocate 8 GB
E1122 23:40:00.000 torch/distributed/elastic/multiprocessing/api.py:874] failed
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer.job FAILED
------------------------------------------------------------
"""


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return freeze(tiny_model.made_up_preferences(30), tmp_path / "snapshots", None)


@pytest.fixture
def run(tmp_path: Path, snapshot: Snapshot) -> Run:
    plan = Plan(load_recipe("dpo-lora"), 3, 1, seed=1, practice=None, device="cpu", requested_by="ann")
    return plan_run(plan, snapshot, tiny_model.shared_tiny(), tmp_path)


def surroundings(tmp_path: Path) -> Surroundings:
    return Surroundings(Versions(tmp_path / "versions"), lambda: "v0", lambda _seconds: None)


def done(run: Run, base: Path) -> None:
    """Leave what the children leave."""
    made = trained_run(base)
    for name in ("adapter", "adapter.gguf", "training.json"):
        (made.directory / name).rename(run.directory / name)
    counted = count([{"difference": 1.0}] * 9, 0.1)
    write_json(run.directory / "evaluation.json", {**counted, "champion": "v0", "candidate": "v1", "results": []})


def test_a_plan_is_complete_before_anything_starts(run: Run, snapshot: Snapshot, tmp_path: Path) -> None:
    config = run.config
    assert run.state is RunState.QUEUED
    assert config.snapshot["hash"] == snapshot.hash
    assert config.snapshot["planned_steps"] == 3
    assert (config.seed, config.requested_by, config.base["name"]) == (1, "ann", "tiny")
    assert config.models_dir == str(tmp_path / "models")
    assert set(config.recipe) >= {"beta", "learning_rate", "lora_rank", "batch_size"}


def test_what_is_done_is_not_done_again(run: Run, tmp_path: Path) -> None:
    done(run, tmp_path)
    ensure_prepared(run)
    run.move(RunState.TRAINING)
    run.move(RunState.EVALUATING, champion="v0", candidate="v1")
    run_cycle(run, surroundings(tmp_path))
    assert (run.state, run.version) == (RunState.FINISHED, "v1")
    assert run.verdict is not None
    assert run.verdict["decision"] == "promote"
    assert not (run.directory / "log.txt").exists(), "a child was started"


def test_a_server_killed_between_publishing_and_noting_it_publishes_once(run: Run, tmp_path: Path) -> None:
    done(run, tmp_path)
    ensure_prepared(run)
    run.move(RunState.EVALUATING, champion="v0", candidate="v1")
    around = surroundings(tmp_path)
    around.versions.publish(run, "v1", VERDICT)
    run_cycle(run, around)
    assert run.version == "v1"
    assert around.versions.names() == ["v1"]


@pytest.mark.parametrize("stage", ["training", "evaluation"])
def test_a_child_that_died_once_too_often_while_nobody_looked_fails_the_run(
    run: Run, tmp_path: Path, stage: str
) -> None:
    run.move(RunState.PREPARING)
    if stage == "evaluation":
        done(run, tmp_path)
        (run.directory / "evaluation.json").unlink()
        run.move(RunState.EVALUATING, champion="v0", candidate="v1")
    run.note(child=stage, pid=2**22 - 1, process_start_time=1.0)
    (run.directory / "log.txt").write_text(KILLED)
    run.note(tries=3, tried_at=f"{stage} 0")
    with pytest.raises(ChildFailed, match=f"^The {stage} failed: its process was killed"):
        run_cycle(run, surroundings(tmp_path))


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (KILLED, "The training failed: its process was killed (signal 9)."),
        (CRASHED, "The training failed: RuntimeError: not enough memory: you tried to allocate 8 GB"),
        ("", "The training failed: its process was killed or crashed before it was done."),
        ("Stopped here\nSomeWarning: old\n", "The training failed: its process was killed or crashed"),
    ],
)
def test_the_reason_is_a_sentence_then_the_log(run: Run, log: str, sentence: str) -> None:
    (run.directory / "log.txt").write_text(log)
    first, *rest = reason_of_death(run, "training").splitlines()
    assert first.startswith(sentence)
    assert rest[0] == "Last lines of its log:"
    assert not any("Traceback" in line or "  File" in line or "====" in line for line in rest)
    assert len(rest) <= 13


def test_a_childs_own_sentence_comes_first(run: Run) -> None:
    (run.directory / "log.txt").write_text(CRASHED)
    write_json(run.directory / "failure.json", {"stage": "training", "reason": "At step 3 loss is nan."})
    assert reason_of_death(run, "training").startswith("The training failed: At step 3 loss is nan.\n")


def test_a_version_on_another_base_is_not_compared(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    versions.publish(trained_run(tmp_path), "v1", VERDICT)
    assert weights_of("v0", "tiny", versions) is None
    assert weights_of("v1", "tiny", versions) == versions.directory / "v1" / "adapter"
    with pytest.raises(TrainerError, match="made from tiny, the model in use is zephyr-7b"):
        weights_of("v1", "zephyr-7b", versions)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("auto", "cpu", "fp32"), ("auto", "gpu", "bf16"), ("fp32", "gpu", "fp32"), ("bf16", "cpu", "bf16")],
)
def test_the_precision_is_said(snapshot: Snapshot, precision: str, device: str, expected: str) -> None:
    made = comparison(
        recipe=replace(load_recipe("dpo-lora"), precision=precision),
        base=tiny_model.shared_tiny().as_dict(),
        models_dir="models",
        device=device,
        snapshot=snapshot,
        candidate=("v1", Path("adapter")),
        champion=("v0", None),
    )
    assert made["precision"] == expected
    assert made["champion"] == {"version": "v0", "adapter": None}
    assert Path(made["held_out"]).is_absolute()
