"""RUN_DIR/report.html: what was asked, what came out and how it went, on one page that stands alone.

The parent has it written at the end of every run, also of one that failed or was cancelled (`ensure_report`), in a
process of its own, so that the server neither loads matplotlib nor stops for it. By hand: `python -m trainer.report
RUN_DIR`, also for the directory of an evaluation or a benchmark that was asked for by itself (`zloop evaluate`). Reads
that directory only. No script, nothing from elsewhere; every text is escaped by Jinja2.

Not covered: comparing runs (TensorBoard does, see `trackers.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from feedback_store.clean_environment import clean_environment
from feedback_store.durable import read_json
from feedback_store.private_files import new_files_private
from trainer.benchmarks.report import benchmark_page
from trainer.curves import CURVES, draw
from trainer.generation import MAX_TOKENS
from trainer.pages import REPORT, render_page, write_page
from trainer.runs import Run
from trainer.verdict import decide

log = logging.getLogger(__name__)

LIMIT_S = 60
DECISIONS = {"promote": "better", "keep": "not enough evidence", "reject": "worse"}
LIBRARIES = ("zephyr-loop", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
LONGER, SPIKE, FEW_PAIRS, LAST_STEPS = 1.2, 5.0, 20, 10


def ensure_report(run: Run) -> Path | None:
    """Write the report in a process of its own; None, with a line in our log, where that fails: the run stays as it is.

    Niced, at most `LIMIT_S` seconds.
    """
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trainer.report", str(run.directory)],
            env={**clean_environment(), "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("The report of %s was not written: %s", run.run_id, error)
        return None
    if done.returncode:
        log.warning("The report of %s was not written: %s", run.run_id, done.stderr.strip()[-500:])
        return None
    return run.directory / REPORT


def write_report(run: Run) -> Path:
    """Write RUN_DIR/report.html, whole or not at all."""
    return write_page(run.directory, render(run))


def render(run: Run) -> str:
    """The page of a run, or of an evaluation or a benchmark that was asked for by itself."""
    if (run.directory / "benchmark.json").is_file():
        return benchmark_page(run.directory)
    evaluation = run.evaluation
    if evaluation is not None and not (run.directory / "state.json").is_file():  # a run has a state
        return render_page("evaluation.html", _facts_of_evaluation(run.run_id, evaluation))
    return render_page("report.html", _facts(run))


def _facts_of_evaluation(evaluation_id: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template of a lone evaluation names."""
    verdict = decide(evaluation, evaluation["champion"], evaluation["candidate"])
    return {
        "evaluation_id": evaluation_id,
        "evaluation": evaluation,
        "candidate": evaluation["candidate"],
        "champion": evaluation["champion"],
        "verdict": verdict.as_dict(),
        "decision": DECISIONS[verdict.decision],
        "warnings": warnings_of((), None, evaluation),
        "examples": examples_of(evaluation),
        "example_tokens": MAX_TOKENS,
        "command": f"zloop evaluate {evaluation['candidate']} --against {evaluation['champion']}",
        "libraries": _libraries(),
    }


def _facts(run: Run) -> dict[str, Any]:
    """Everything the template names."""
    config = read_json(run.directory / "config.json") or {}
    record, lines, evaluation = run.record, run.metrics(), run.evaluation
    verdict = record.get("verdict")
    return {
        "run_id": run.run_id,
        "recipe_name": config["recipe_name"],
        "practice": config["practice"],
        "requested_by": config["requested_by"],
        "began": _moment(config["created_at"]),
        "ended": _moment(record.get("finished_at")),
        "state": record["state"],
        "error": record.get("error"),
        "version": record.get("version"),
        "verdict": verdict,
        "decision": DECISIONS[verdict["decision"]] if verdict else None,
        "evaluation": evaluation,
        "candidate": evaluation["candidate"] if evaluation else None,
        "champion": evaluation["champion"] if evaluation else None,
        "warnings": warnings_of(lines, run.training, evaluation),
        "examples": examples_of(evaluation),
        "example_tokens": MAX_TOKENS,
        "pictures": _pictures(lines),
        "asked": _asked(config),
        "preferences": _preferences(config["snapshot"], run.training),
        "taken": _taken(config, run, lines),
        "recipe": [(name, "null" if value is None else str(value)) for name, value in config["recipe"].items()],
        "commands": _commands(config, run),
        "libraries": _libraries(),
    }


def warnings_of(
    lines: Sequence[Mapping[str, Any]], training: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> list[str]:
    """What somebody should look at before they trust the run, each a sentence with its numbers."""
    found = []
    steps = [line for line in lines if "loss" in line]
    lengths = [(line["lengths/chosen"], line["lengths/rejected"]) for line in steps if "lengths/chosen" in line]
    if lengths:
        chosen, rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
        if chosen > LONGER * rejected:
            found.append(
                f"The chosen answers are {chosen / max(rejected, 1e-9) - 1:.0%} longer than the rejected ones "
                f"({chosen:.0f} against {rejected:.0f} tokens): it may have learned to write more, not better."
            )
    accuracies = [line["rewards/accuracies"] for line in steps if "rewards/accuracies" in line][-LAST_STEPS:]
    if len(accuracies) == LAST_STEPS and min(accuracies) == 1:
        found.append(
            f"rewards/accuracies was 100% in each of the last {LAST_STEPS} steps: it knows these pairs by heart. "
            "Fewer epochs or a lower learning_rate may do better on others."
        )
    norms = [line["grad_norm"] for line in steps if "grad_norm" in line]
    spikes = [line["step"] for line in steps if line.get("grad_norm", 0) > SPIKE * median(norms)] if norms else []
    if spikes:
        found.append(
            f"grad_norm rose above {SPIKE:g} times its median ({median(norms):.3g}) at {len(spikes)} "
            f"step{'s' if len(spikes) > 1 else ''}, first at step {spikes[0]}."
        )
    dropped = (training or {}).get("dropped_over_long", 0)
    if dropped:
        found.append(f"Left out because the prompt is longer than max_length: {_counted(dropped, 'row')}.")
    stopped_at = ((training or {}).get("validation") or {}).get("stopped_at")
    if training and stopped_at:
        found.append(
            f"It stopped early at step {stopped_at}: the accuracy on rows kept aside had fallen. "
            f"The weights of step {training['validation']['best_step']} were kept."
        )
    if evaluation and evaluation["pairs"] < FEW_PAIRS:
        found.append(
            f"Judged on {_counted(evaluation['pairs'], 'held-out pair')} only: that shows large differences alone."
        )
    if evaluation and evaluation["skipped_over_long"]:
        found.append(
            f"Not judged because the prompt is too long: {_counted(evaluation['skipped_over_long'], 'held-out pair')}."
        )
    return found


def _pictures(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {"title": curve.title, "about": curve.about, "words": _in_words(lines, curve.keys), "svg": svg}
        for curve in CURVES
        if (svg := draw(curve, lines)) is not None
    ]


def _in_words(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """`0.693 → 0.512` of each key."""
    said = []
    for key in keys:
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            name = f"{key.rpartition('/')[2]} " if len(keys) > 1 else ""
            said.append(f"{name}{values[0]:.3g} → {values[-1]:.3g}")
    return ", ".join(said)


def examples_of(evaluation: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """What both versions wrote, for the template."""
    return [
        {
            "question": one["question"],
            "before": one["champion"] or "(nothing)",
            "after": one["candidate"] or "(nothing)",
        }
        for one in (evaluation or {}).get("examples", ())
    ]


def _asked(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    steps = config["max_steps"]
    return [
        ("base", str(config["base"]["name"])),
        ("seed", str(config["seed"])),
        ("processes", str(config["num_processes"])),
        ("device", str(config["device"])),
        ("steps at most", "as many as it needs" if steps is None else f"{steps:,}"),
        ("steps planned", f"{config['snapshot']['planned_steps']:,}"),
    ]


def _preferences(snapshot: Mapping[str, Any], training: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    validation = (training or {}).get("validation") or {}
    rows = [("snapshot", str(snapshot["hash"])[:12]), ("to train on", f"{snapshot['train_rows']:,}")]
    rows += [("held out", f"{snapshot['held_out_rows']:,}")]
    rows += [(f"from {source}", f"{count:,}") for source, count in sorted(snapshot["counts"].items())]
    if training:
        rows += [("learned from", f"{training['pairs']:,}"), ("validated on", f"{validation.get('pairs', 0):,}")]
    return rows


def _taken(config: Mapping[str, Any], run: Run, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Estimate and what happened, `–` where there is none."""
    estimate = (config.get("preflight") or {}).get("estimate") or {}
    measured = (run.training or {}).get("measured") or {}
    steps = [line for line in lines if "loss" in line]
    between = steps[-1]["time"] - steps[0]["time"] if len(steps) > 1 else None
    finished_at = run.record.get("finished_at")
    total_s = None
    if finished_at:
        total_s = (datetime.fromisoformat(finished_at) - datetime.fromisoformat(config["created_at"])).total_seconds()
    peak = measured.get("peak_device_memory_bytes") or measured.get("peak_memory_bytes")
    return [
        ("whole run", _duration(estimate.get("total_s")), _duration(total_s)),
        ("training", _duration(estimate.get("training_s")), _duration(measured.get("training_s", between))),
        ("evaluation", _duration(estimate.get("evaluation_s")), _duration(measured.get("evaluation_s"))),
        ("peak memory", _gigabytes(estimate.get("memory_bytes")), _gigabytes(peak)),
        ("steps", f"{config['snapshot']['planned_steps']:,}", f"{steps[-1]['step']:,}" if steps else "–"),
    ]


def _commands(config: Mapping[str, Any], run: Run) -> list[str]:
    """The command of the product, then what its children were started as."""
    if config["practice"]:
        command = f"zloop practice --taste {config['practice']} --num-processes {config['num_processes']}"
    else:
        steps = f" --max-steps {config['max_steps']}" if config["max_steps"] else ""
        command = (
            f"zloop train --recipe {config['recipe_name']} --seed {config['seed']} "
            f"--num-processes {config['num_processes']}{steps}"
        )
    path = run.directory / "log.txt"
    started = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [command, *dict.fromkeys(line.removeprefix("$ ") for line in started if line.startswith("$ "))]


def _libraries() -> list[tuple[str, str]]:
    found = [("Python", sys.version.split()[0])]
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append((name, metadata.version(name)))
    return found


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _moment(text: str | None) -> str | None:
    return text[:16].replace("T", " ") + " UTC" if text else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _gigabytes(number: float | None) -> str:
    return "–" if number is None else f"{number / 1e9:.1f} GB"


if __name__ == "__main__":
    os.nice(10)
    new_files_private()
    write_report(Run(Path(sys.argv[1])))
