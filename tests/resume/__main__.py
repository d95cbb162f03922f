"""The whole harness → docs/benchmarks/resume.md: ``python -m tests.resume [--only random] [--times 50]``."""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import tiny_model  # noqa: E402
from faults import disk  # noqa: E402

from resume import cancels  # noqa: E402
from resume.kills import RECIPE, STEPS, Bench, Nursery, Outcome, at_places, at_random, differences  # noqa: E402
from trainer.base_model import embedded  # noqa: E402
from trainer.launch import is_alive, start_training  # noqa: E402
from trainer.recipe import load_recipe  # noqa: E402
from trainer.runs import Run  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "resume.md"
EMBEDDED_STEPS = 4
CANCEL_S = 15
SEED = 0
TITLE = f"""# kill -9 of a training

`python -m tests.resume`. After a kill the training goes on; compared with an undisturbed one are every byte of the
adapter in both forms and of `training.json`, and every number of every line of `metrics.jsonl` but the time.
The tiny model has two layers; it learns {STEPS} steps of {RECIPE.batch_size} pairs, LoRA, a checkpoint every
{RECIPE.save_every_steps} steps, one thread. Its training is `trainer.job` itself, forked from a process that has
imported torch already. Not tested here: power cuts, GPUs.
"""

Section = tuple[str, list[str]]  # the text, and what must not be


def random_section(directory: Path, times: int) -> Section:
    """Kills at random moments of the tiny model's training."""
    with Nursery() as nursery:
        outcome = at_random(_tiny(directory), nursery, times, SEED)
    return _table(outcome), outcome.differences


def places_section(directory: Path, times: int) -> Section:
    """Kills at chosen changes of a file."""
    if not disk.CAN_COMPILE:
        return "No C compiler here: no kills at chosen places.\n", []
    bench = _tiny(directory)
    with Nursery(disk.compiled(directory)) as nursery:
        outcome = at_places(bench, nursery, times)
    text = """Spread over every write, sync, rename, removing and making of a file in the run directory, half of them
over the last tenth, where the result is saved; a write also after half of its bytes and after its first page.
"""
    return f"{text}\n{_table(outcome)}", outcome.differences


def embedded_section(directory: Path, times: int) -> Section:
    """Kills of a training of the embedded model, started as the product starts it."""
    return _launched_section(Bench(directory, embedded(), load_recipe("dpo-lora"), EMBEDDED_STEPS), times)


def processes_section(directory: Path, times: int) -> Section:
    """Kills of a training on two processes."""
    return _launched_section(Bench(directory, tiny_model.shared_tiny(), num_processes=2), times)


def _launched_section(bench: Bench, times: int) -> Section:
    warm, whole = bench.run(), bench.run()
    _launched(warm)
    began = time.monotonic()
    _launched(whole)
    assert whole.training is not None, whole.log_tail(30)
    lasts_s = time.monotonic() - began
    kills, begun_at = 0, []
    wrong = [f"undisturbed twice: {one}" for one in differences(warm, whole)]
    for number in range(times):
        run = bench.run()
        kills += _launched(run, 1 + number * (bench.steps - 2) // max(1, times - 1))
        _launched(run)
        begun_at.append(int(run.progress.get("from_step", 0)))
        wrong += differences(run, whole)
    text = f"""{bench.steps} steps of {bench.recipe.batch_size} pairs, {lasts_s:.0f} s undisturbed. {kills} kills of
launcher and workers after steps spread over it, gone on from the checkpoints of steps {", ".join(map(str, begun_at))}.
**Not as in the undisturbed training: {len(wrong)}.**
"""
    return text, wrong


def cancels_section(directory: Path, times: int) -> Section:
    """How soon a cancelled run is gone."""
    taken = cancels.run(directory, embedded(), times)
    slow = [f"cancelled while {stage}: {max(seconds)} s" for stage, seconds in taken.items() if max(seconds) > CANCEL_S]
    rows = "".join(f"| {stage} | {' · '.join(f'{one:.1f}' for one in seconds)} |\n" for stage, seconds in taken.items())
    text = f"""The embedded model; seconds until the run is `cancelled` and no process of it is left (limit {CANCEL_S}).

| cancelled while | seconds |
|---|---|
{rows}"""
    return text, slow


SECTIONS: dict[str, tuple[str, Callable[[Path, int], Section], int]] = {
    "random": ("At random moments", random_section, 50),
    "places": ("Before and in the middle of changes of files", places_section, 40),
    "embedded": ("The embedded model, started as the product starts it", embedded_section, 3),
    "processes": ("The tiny model on two processes, started as the product starts it", processes_section, 3),
    "cancels": ("A cancelled run", cancels_section, 3),
}


def _tiny(directory: Path) -> Bench:
    return Bench(directory, tiny_model.shared_tiny())


def _launched(run: Run, kill_after_step: int | None = None) -> bool:
    """Train through accelerate; whether it was killed, launcher and workers."""
    child = start_training(run.directory, num_processes=run.config.num_processes)
    while is_alive(child.pid, child.start_time):
        if kill_after_step is not None and len(run.metrics()) >= kill_after_step:
            launcher = psutil.Process(child.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()
            psutil.wait_procs([launcher])
            return True
        time.sleep(0.01)
    return False


def _table(outcome: Outcome) -> str:
    rows = "".join(f"| {moment} | {count} |\n" for moment, count in sorted(outcome.met.items()))
    begun = ", ".join(f"{step} ({count} times)" for step, count in sorted(outcome.went_on_from.items()))
    return f"""| the kill came | times |
|---|---|
{rows}
{outcome.kills} kills in {outcome.runs} trainings. Gone on at last from the checkpoint of step {begun}.
**Not as in the undisturbed training: {len(outcome.differences)}.**
"""


def _report(new: dict[str, str]) -> str:
    """The report with these sections; the others as they stand in it."""
    there = REPORT.read_text(encoding="utf-8").split("\n## ")[1:] if REPORT.is_file() else []
    old = {part.partition("\n")[0]: part.partition("\n")[2] for part in there}
    sections = {title: new.get(title, old.get(title)) for title, _, _ in SECTIONS.values()}
    return "\n".join([TITLE, *(f"## {title}\n{text}" for title, text in sections.items() if text is not None)])


def main() -> None:
    """Run everything, or one section, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one section; the others stay as they are")
    parser.add_argument("--times", type=int, help="how many kills or cancels, for each section")
    parser.add_argument("--no-report", action="store_true")
    arguments = parser.parse_args()
    texts, wrong = {}, []
    for name, (title, section, times) in SECTIONS.items():
        if arguments.only in (None, name):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as directory:
                text, complaints = section(Path(directory).resolve() / "data", arguments.times or times)
            wrong += complaints
            texts[title] = f"""
{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch
{metadata.version("torch")}, {time.monotonic() - began:.0f} s.

{text}"""
            print(f"## {title}\n{texts[title]}", flush=True)
    if not arguments.no_report:
        REPORT.write_text(_report(texts), encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
