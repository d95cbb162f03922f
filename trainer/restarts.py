"""Whether a run goes on after its child died, and whether a person may resume one that ended.

A child that died without a word (killed, the machine restarted) is started again from its last checkpoint, at most
`TRIES` times without getting further in between. One that stopped by its own sentence stays stopped: it would stop
again. Out of memory may be tried again with half the micro batch (`retry_half_batch`): the batch of a step stays what
it was, so the result does too, but for the order of additions.
"""

from __future__ import annotations

from pathlib import Path

from feedback_store.errors import StoreError
from feedback_store.snapshots import load_snapshot
from trainer.base_model import BaseModel, base_directory
from trainer.checkpoints import last_step
from trainer.errors import BadRunRequest, ChildFailed, OutOfMemory
from trainer.recipe import from_mapping
from trainer.runs import Run, RunState

TRIES = 3
PAUSES_S = (1.0, 4.0, 16.0)


def prepare_restart(run: Run, stage: str, reason: str, *, is_out_of_memory: bool) -> float:
    """Note that the dead child of `stage` is started again; the seconds to wait first.

    Raises ChildFailed with `reason` where it is not.
    """
    record = run.record
    if is_out_of_memory or run.failure_kind == OutOfMemory.__name__:
        recipe = from_mapping(run.config.recipe_name, run.config.recipe)
        if stage != "training" or not recipe.retry_half_batch or recipe.halved(run.halvings).micro_batch_size == 1:
            raise ChildFailed(reason)
        run.restart(halvings=run.halvings + 1)
        return 0.0
    if run.failure is not None:
        raise ChildFailed(reason)
    at = f"{stage} {last_step(run.directory)}"
    tries = record.get("tries", 0) if record.get("tried_at") == at else 0
    if tries == TRIES:
        raise ChildFailed(f"{reason}\nIt was started again {TRIES} times and got no further. Resume it when it may.")
    run.restart(tries=tries + 1, tried_at=at)
    return PAUSES_S[tries]


def check_resumable(run: Run, base: BaseModel, models_dir: Path) -> None:
    """Raises BadRunRequest with the reason why this run, which is not active, cannot go on with what is here now."""
    if run.state is RunState.FINISHED:
        raise BadRunRequest(f"Run {run.run_id} is finished: there is nothing to resume. Start a new run.")
    config = run.config
    try:
        load_snapshot(Path(config.snapshot["directory"]))
    except StoreError as error:
        raise BadRunRequest(
            f"Run {run.run_id} cannot be resumed: its snapshot {config.snapshot['hash']} was erased or is damaged. "
            "Start a new run on the present preferences."
        ) from error
    trained_on, present = config.base.get("fingerprint"), fingerprint(base, models_dir)
    if config.base["name"] != base.name or trained_on not in (None, present):
        raise BadRunRequest(
            f"Run {run.run_id} cannot be resumed: it began on the base {config.base['name']} ({trained_on}), the base "
            f"is {base.name} ({present}) now. Set ZLOOP_MODEL back, or start a new run."
        )


def fingerprint(base: BaseModel, models_dir: Path) -> str:
    """What tells a base from another one of the same name: a hash of the GGUF file, else sizes of the weights."""
    directory = base_directory(base, models_dir)
    if base.gguf is not None:
        return directory.name.rpartition("-")[2]
    sizes = [str(path.stat().st_size) for path in sorted(directory.glob("*.safetensors"))]
    return f"weights of {'+'.join(sizes)} bytes" if sizes else "not here yet"
