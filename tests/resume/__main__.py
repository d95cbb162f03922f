"""The whole harness → docs/benchmarks/resume.md: ``python -m tests.resume [--kills 50] [--places 40] [--short]``."""

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_model  # noqa: E402
from faults import disk  # noqa: E402

from resume import cancels  # noqa: E402
from resume.kills import RECIPE, STEPS, Bench, Nursery, Outcome, at_places, at_random, differences  # noqa: E402
from trainer.base_model import embedded  # noqa: E402
from trainer.launch import is_alive, start_training  # noqa: E402
from trainer.recipe import load_recipe  # noqa: E402
from trainer.runs import Run  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "resume.md"
EMBEDDED_STEPS = 6
CANCEL_S = 15


def launched(run: Run, kill_after_s: float | None = None) -> bool:
    """Train as the product does, through accelerate; whether it was killed with everything it had started."""
    child, began = start_training(run.directory, num_processes=1), time.monotonic()
    while is_alive(child.pid, child.start_time):
        if kill_after_s is not None and time.monotonic() - began > kill_after_s:
            os.killpg(child.pid, signal.SIGKILL)
            return True
        time.sleep(0.05)
    return False


def with_the_embedded_model(directory: Path, kills: int) -> tuple[int, list[str], list[int]]:
    """Kill a real training so often, spread over its length: the kills, the differences, where it went on from."""
    tiny_model.lend_models(directory)
    bench = Bench(directory, embedded(), load_recipe("dpo-lora"), EMBEDDED_STEPS)
    whole, began = bench.run(), time.monotonic()
    launched(whole)
    assert whole.training is not None, whole.log_tail(30)
    lasts_s = time.monotonic() - began
    done, found, begun_at = 0, [], []
    for number in range(kills):
        run = bench.run()
        done += launched(run, lasts_s * (number + 1) / (kills + 1))
        launched(run)
        begun_at.append(int(run.progress.get("from_step", 0)))
        found += differences(run, whole)
    return done, found, begun_at


def table(outcome: Outcome) -> str:
    """Where the kills met the training."""
    rows = "".join(f"| {moment} | {count} |\n" for moment, count in sorted(outcome.met.items()))
    begun = ", ".join(f"{step}: {count}" for step, count in sorted(outcome.went_on_from.items()))
    return f"""| the kill came | times |
|---|---|
{rows}
{outcome.kills} kills in {outcome.runs} trainings. Gone on from the checkpoint of step (0: from the start): {begun}.
**Not as in the undisturbed training: {len(outcome.differences)}.**
"""


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments")
    parser.add_argument("--places", type=int, default=40, help="kills at chosen changes of a file")
    parser.add_argument("--embedded", type=int, default=3, help="kills of a training of the embedded model")
    parser.add_argument("--cancels", type=int, default=3, help="runs cancelled in each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each; no report is written")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.kills, arguments.places, arguments.embedded, arguments.cancels = 4, 6, 0, 0
    began, wrong, parts = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        tiny_model.lend_models(directory / "tiny")
        bench = Bench(directory / "tiny", tiny_model.shared_tiny())
        with Nursery() as nursery:
            random_kills = at_random(bench, nursery, arguments.kills, arguments.seed)
        wrong += random_kills.differences
        parts.append(f"## At random moments (seed {arguments.seed})\n\n{table(random_kills)}")
        if disk.CAN_COMPILE:
            with Nursery(disk.compiled(directory)) as nursery:
                directed = at_places(bench, nursery, arguments.places)
            wrong += directed.differences
            parts.append(
                "## Before and in the middle of changes of files\n\nSpread evenly over every write, sync, rename, "
                f"unlink and making of a file in the run directory.\n\n{table(directed)}"
            )
        if arguments.cancels:
            taken = cancels.run(directory / "cancelled", embedded(), arguments.cancels)
            wrong += [
                f"cancelled while {stage}: {max(all_)} s" for stage, all_ in taken.items() if max(all_) > CANCEL_S
            ]
            rows = "".join(
                f"| {stage} | {' · '.join(f'{one:.1f}' for one in all_)} |\n" for stage, all_ in taken.items()
            )
            parts.append(
                "## Cancelled\n\nThe embedded model; seconds until the run is `cancelled` and no process of it is "
                f"left. The limit is {CANCEL_S} s.\n\n| cancelled while | seconds |\n|---|---|\n{rows}"
            )
        if arguments.embedded:
            done, found, begun_at = with_the_embedded_model(directory / "embedded", arguments.embedded)
            wrong += found
            parts.append(
                f"## The embedded model, started as the product starts it\n\nRecipe dpo-lora, {EMBEDDED_STEPS} steps, "
                f"{done} kills of the whole process group, gone on from the checkpoints of steps "
                f"{', '.join(map(str, begun_at))}. **Not as in the undisturbed training: {len(found)}.**\n"
            )
    title = f"""# kill -9 of a training

`python -m tests.resume`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python
{platform.python_version()}, torch {metadata.version("torch")}, {time.monotonic() - began:.0f} s. After the kills the
training goes on; compared are every byte of the adapter in both forms, `training.json`, and every number of every line
of `metrics.jsonl` but the time. The tiny model (two layers), LoRA, {STEPS} steps of {RECIPE.batch_size} pairs, a
checkpoint every {RECIPE.save_every_steps} steps, one thread. The training is `trainer.job` itself, forked from a
process that has imported torch already. Not tested here: power cuts, GPUs, several processes.
"""
    report = "\n".join([title, *parts])
    print(report)
    if not arguments.short:
        REPORT.write_text(report, encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
