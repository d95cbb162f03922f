"""When a dead child is started again, when a run may be resumed, and what is said where it is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model

from feedback_store.durable import write_json
from feedback_store.mixing import Mix
from feedback_store.snapshots import freeze
from trainer.base_model import BaseModel
from trainer.checkpoints import FOLDER, MANIFEST
from trainer.cycle import Plan, plan_run
from trainer.errors import BadRunRequest, ChildFailed
from trainer.recipe import from_mapping
from trainer.restarts import PAUSES_S, TRIES, check_resumable, prepare_restart
from trainer.runs import Run, RunState


def planned(directory: Path, **recipe: object) -> Run:
    snapshot = freeze(tiny_model.made_up_preferences(20), directory / "snapshots", None, Mix())
    plan = Plan(from_mapping("mine", recipe), 3, 1, seed=1, practice=None, device="cpu", requested_by="ann")
    run = plan_run(plan, snapshot, tiny_model.shared_tiny(), directory)
    run.move(RunState.PREPARING)
    run.note(child="training", pid=1, process_start_time=1.0)
    return run


def checkpoint(run: Run, step: int) -> None:
    directory = run.directory / FOLDER / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    write_json(directory / MANIFEST, {})


def test_a_killed_child_is_started_again_three_times_without_getting_further(tmp_path: Path) -> None:
    run = planned(tmp_path)
    pauses = [prepare_restart(run, "training", "killed", is_out_of_memory=False) for _ in range(TRIES)]
    assert tuple(pauses) == PAUSES_S
    assert run.record["child"] is None
    checkpoint(run, 2)
    assert prepare_restart(run, "training", "killed", is_out_of_memory=False) == PAUSES_S[0]
    for _ in range(TRIES - 1):
        prepare_restart(run, "training", "killed", is_out_of_memory=False)
    with pytest.raises(ChildFailed, match=r"^killed\nIt was started again 3 times and got no further"):
        prepare_restart(run, "training", "killed", is_out_of_memory=False)
    assert prepare_restart(run, "evaluation", "killed", is_out_of_memory=False) == PAUSES_S[0], "another stage"
    assert run.as_body()["resumed"] == 2 * TRIES + 1


def test_a_child_that_said_why_it_stopped_is_not_started_again(tmp_path: Path) -> None:
    run = planned(tmp_path)
    write_json(run.directory / "failure.json", {"stage": "training", "reason": "At step 3 loss is nan.", "kind": "x"})
    with pytest.raises(ChildFailed, match="loss is nan"):
        prepare_restart(run, "training", "The training failed: loss is nan", is_out_of_memory=False)
    assert run.as_body()["resumed"] == 0


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize(
    ("step", "tokens"),
    [
        ({"fast_step": "off"}, [None, None, None]),
        ({"fast_step": "auto"}, [None, 512, 256, 128]),
        ({"tokens_per_batch": 64}, [64, 64, 64]),
    ],
)
def test_out_of_memory_is_tried_again_with_half_as_many_down_to_the_least(
    tmp_path: Path, step: dict[str, object], tokens: list[int | None], killed: bool
) -> None:
    run = planned(tmp_path, retry_half_batch=True, micro_batch_size=4, **step)
    for halvings in range(1, len(tokens)):
        if not killed:
            write_json(run.directory / "failure.json", {"reason": "Out of memory", "kind": "OutOfMemory"})
        assert prepare_restart(run, "training", "no memory", is_out_of_memory=killed) == 0.0
        assert (run.halvings, run.failure) == (halvings, None)
    recipe = from_mapping("mine", run.config.recipe)
    assert [recipe.halved(times).micro_batch_size for times in range(4)] == [4, 2, 1, 1]
    assert [recipe.halved(times).tokens_per_batch for times in range(len(tokens))] == tokens
    assert recipe.halved(2).batch_size == recipe.batch_size
    with pytest.raises(ChildFailed, match="no memory"):
        prepare_restart(run, "training", "no memory", is_out_of_memory=True)


def test_out_of_memory_ends_it_where_nobody_asked_for_less_or_less_is_no_help(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="no memory"):
        prepare_restart(planned(tmp_path / "1"), "training", "no memory", is_out_of_memory=True)
    asked = planned(tmp_path / "2", retry_half_batch=True)
    with pytest.raises(ChildFailed, match="no memory"):
        prepare_restart(asked, "evaluation", "no memory", is_out_of_memory=True)


def test_what_can_be_resumed_goes_back_to_the_line(tmp_path: Path) -> None:
    run = planned(tmp_path)
    for name in ("failure.json", "evaluation.json"):
        write_json(run.directory / name, {})
    run.note(cores=3, halvings=1, tries=2)
    run.end(RunState.FAILED, error="killed")
    check_resumable(run, tiny_model.shared_tiny(), tmp_path / "models")
    run.reopen()
    record = run.record
    assert (record["state"], record["resumed"], record["cores"], record["halvings"]) == ("queued", 1, 3, 1)
    assert not {"error", "finished_at", "child", "pid", "tries"} & set(record)
    assert run.failure is None
    assert run.evaluation is None


def test_what_cannot_be_resumed_is_refused_with_the_reason(tmp_path: Path) -> None:
    run, models = planned(tmp_path), tmp_path / "models"
    run.end(RunState.FAILED, error="killed")
    base = tiny_model.shared_tiny()
    with pytest.raises(BadRunRequest, match=r"it began on the base tiny \(\w+\), the base is other"):
        check_resumable(run, BaseModel("other", base.gguf), models)
    changed = tiny_model.tiny_base(tmp_path / "changed" / "tiny.gguf", seed=5)
    with pytest.raises(BadRunRequest, match=r"the base tiny \(\w{12}\), the base is tiny \(\w{12}\) now. Set ZLOOP"):
        check_resumable(run, replace(base, gguf=changed.gguf), models)
    Path(run.config.snapshot["directory"]).rename(tmp_path / "erased")
    with pytest.raises(BadRunRequest, match=r"its snapshot .* was erased or is damaged"):
        check_resumable(run, base, models)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    run = planned(tmp_path)
    run.move(RunState.EVALUATING)
    run.end(RunState.FINISHED, version="v1")
    with pytest.raises(BadRunRequest, match="is finished: there is nothing to resume"):
        check_resumable(run, tiny_model.shared_tiny(), tmp_path / "models")
