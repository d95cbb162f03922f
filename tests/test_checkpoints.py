"""Checkpoints on a plain Trainer with dropout: interrupted at every step it ends as undisturbed, damage is seen."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from test_runs import config

from feedback_store.durable import write_json
from trainer.checkpoints import (
    KEPT,
    MANIFEST,
    Checkpoints,
    discard_unfinished,
    last_step,
    remove_checkpoints,
    step_of,
    train_from_last,
)
from trainer.errors import Diverged
from trainer.progress import FIRST_LOSS, Progress, reference_loss, watch
from trainer.runs import Run
from trainer.stage import Stage

STEPS = 6


class Interrupted(Exception):
    """Stands for the kill."""


def make_trainer(run: Path, *, spoil: Callable[[int, Any], Any] = lambda _call, loss: loss) -> Any:
    """A Trainer of a small network with dropout, four rows a step in two micro batches; `spoil` changes a loss."""
    import torch
    from transformers import Trainer, TrainingArguments, set_seed

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last = torch.nn.Linear(32, 1)
            torch.nn.init.zeros_(last.weight)  # the first loss is ln 2, as the watch over DPO wants it
            torch.nn.init.zeros_(last.bias)
            self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.5), last)
            self.calls = 0

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            self.calls += 1
            return {
                "loss": spoil(self.calls, torch.nn.functional.softplus(-labels * self.layers(x).squeeze(-1)).mean())
            }

    set_seed(3)
    rows = [{"x": torch.randn(8), "labels": torch.randn(()).sign()} for _ in range(4 * STEPS)]
    return Trainer(
        model=Network(),
        train_dataset=rows,
        args=TrainingArguments(
            output_dir=str(run / "checkpoints"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            seed=3,
            use_cpu=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )


def train(run: Path, every: int | None = 2, interrupt_after: int | None = None, **spoilt: Any) -> tuple[Any, list[str]]:
    """Train in `run` with the lines of a step written; the Trainer and what was said."""
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            if state.global_step == interrupt_after:
                raise Interrupted

    run.mkdir(exist_ok=True)
    write_json(run / "config.json", asdict(config()))
    said: list[str] = []
    trainer = make_trainer(run, **spoilt)
    stage = Stage(trainer, 4 * STEPS, STEPS, 0, lambda _logs: reference_loss(FIRST_LOSS, "ln 2"))
    trainer.add_callback(watch(stage, 4, Progress(Run(run), is_main=True)))
    trainer.add_callback(Interrupt())
    train_from_last(trainer, run / "metrics.jsonl", every, said.append)
    return trainer, said


def weights(trainer: Any) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in trainer.model.state_dict().values()]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in Run(run).metrics()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return weights(train(tmp_path_factory.mktemp("whole") / "run")[0])


@pytest.mark.parametrize("every", [1, 2, None])
def test_interrupted_after_each_step_it_ends_as_undisturbed(
    tmp_path: Path, undisturbed: list[list[float]], every: int | None
) -> None:
    run = tmp_path / "run"
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted):
            train(run, every, interrupt_after=step)
    trainer, said = train(run, every)
    assert weights(trainer) == undisturbed
    assert steps(run) == list(range(1, STEPS + 1))
    assert said == [f"Going on from checkpoint-{last_step(run)}."]
    assert 0 < last_step(run) < STEPS
    kept = [path.name for path in (run / "checkpoints").glob("checkpoint-*")]
    assert len(kept) == KEPT
    remove_checkpoints(run)
    assert last_step(run) == 0


def damage(run: Path, how: str) -> str:
    """Damage the newest of two checkpoints; what is to be said of it."""
    newest = run / "checkpoints" / "checkpoint-4"
    if how == "no manifest":
        (newest / MANIFEST).unlink()
        return "it was not finished"
    if how == "no optimizer":
        (newest / "optimizer.pt").unlink()
        return "optimizer.pt is missing"
    if how == "cut":
        content = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(content[:-1])
        return f"optimizer.pt has {len(content) - 1} bytes, it had {len(content)}"
    if how == "a bit":
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (newest / "model.safetensors").write_bytes(content)
        return r"model.safetensors is not what was written \(its sha256 differs\)"
    if how == "another file":
        (newest / "pytorch_model.bin").write_bytes(b"")
        return "pytorch_model.bin is not one of its files"
    (newest / MANIFEST).write_text("{")
    return r"it cannot be read \(JSONDecodeError"


@pytest.mark.parametrize("how", ["no manifest", "no optimizer", "cut", "a bit", "another file", "half a manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, undisturbed: list[list[float]], how: str, interrupted: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    assert steps(run) == [1, 2, 3, 4, 5]
    expected = damage(run, how)
    trainer, said = train(run)
    assert said[1] == "Going on from checkpoint-2."
    with pytest.raises(AssertionError, match=f"checkpoint-4 is passed over: {expected}"):
        raise AssertionError(said[0])
    assert weights(trainer) == undisturbed
    assert steps(run) == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(Interrupted):
        train(run, interrupt_after=5)
    # The callback of this test comes before the one that saves: the line of step 5 is written, as if killed later.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "time": 1.0, "loss": 0.0}) + "\n")
    return run


def test_with_no_checkpoint_left_it_begins_anew(
    tmp_path: Path, undisturbed: list[list[float]], interrupted: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    for path in (run / "checkpoints").glob("checkpoint-*"):
        (path / "scheduler.pt").unlink()
    trainer, said = train(run)
    assert [line.partition(":")[0] for line in said] == ["checkpoint-4 is passed over", "checkpoint-2 is passed over"]
    assert weights(trainer) == undisturbed
    assert steps(run) == list(range(1, STEPS + 1))


def test_the_lines_before_a_second_training_of_the_run_stay(tmp_path: Path) -> None:
    (tmp_path / "first.jsonl").write_text('{"step": 1}\n')
    checkpoints = Checkpoints(tmp_path / "second", tmp_path / "first.jsonl")
    said: list[str] = []
    assert checkpoints.take_up(said.append) is None
    with (tmp_path / "first.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"st')
    assert checkpoints.take_up(said.append) is None
    assert (tmp_path / "first.jsonl").read_text() == '{"step": 1}\n'
    assert said == []


def test_what_is_half_removed_or_half_saved_goes(interrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    (run / "checkpoints" / "checkpoint-4" / MANIFEST).unlink()
    discard_unfinished(run)
    assert last_step(run) == 2
    assert not (run / "checkpoints" / "checkpoint-4").exists()
    assert (step_of(None), step_of("/x/checkpoint-12")) == (0, 12)


@pytest.mark.parametrize(
    ("bad_call", "value", "said"),
    [
        (5, math.nan, "At step 3 loss is nan"),  # the first micro batch of two
        (6, math.inf, "At step 3 loss is inf"),  # the second
        (8, -math.inf, "At step 4 loss is -inf"),
    ],
)
def test_the_first_value_that_is_not_finite_stops_it_and_is_not_saved(
    tmp_path: Path, bad_call: int, value: float, said: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Diverged, match=said):
        train(run, every=1, spoil=lambda call, loss: loss * value if call == bad_call else loss)
    good = (bad_call - 1) // 2
    assert steps(run) == list(range(1, good + 1))
    assert last_step(run) == good
    assert all_finite(run / "checkpoints" / f"checkpoint-{good}")


def test_a_gradient_that_is_not_finite_stops_it_though_the_loss_is(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def spoil(call: int, loss: Any) -> Any:
        if call == 6:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with pytest.raises(Diverged, match=r"At step 3 grad_norm is (nan|inf)"):
        train(run, every=1, spoil=spoil)
    assert last_step(run) == 2
    assert all_finite(run / "checkpoints" / "checkpoint-2")


def all_finite(checkpoint: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    optimizer = torch.load(checkpoint / "optimizer.pt")
    moments = [moment for state in optimizer["state"].values() for moment in state.values()]
    tensors = [*load_file(checkpoint / "model.safetensors").values(), *moments]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
