"""A run directory with made-up numbers, as a finished run leaves it: for what reads runs and need not make one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from trainer.recipe import load_recipe
from trainer.runs import Run
from trainer.verdict import decide

STEPS = 24


def lines_of(steps: int = STEPS) -> list[dict[str, Any]]:
    """metrics.jsonl: a line a step, and a validation every eighth."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        part = step / steps
        line = {
            "step": step,
            "time": 1e9 + 3.0 * step,
            "pairs": 8 * step,
            "loss": 0.693 - 0.2 * part + 0.01 * (step % 3),
        }
        line |= {"grad_norm": 2.0, "learning_rate": 1e-4 * (1 - part)}
        line |= {"rewards/margins": part, "rewards/accuracies": 0.5 + 0.25 * part}
        line |= {"logps/chosen": -300 - 10 * part, "logps/rejected": -290 - 40 * part}
        line |= {"lengths/chosen": 200.0, "lengths/rejected": 190.0}
        lines.append(line)
        if step % 8 == 0:
            line = {"step": step, "time": 1e9 + 3.0 * step, "pairs": 8 * step, "eval/loss": 0.69 - 0.1 * part}
            lines.append({**line, "eval/rewards/accuracies": 0.5 + 0.1 * part, "eval/rewards/margins": 0.3 * part})
    return lines


def evaluation_of(wins: int, ties: int, losses: int, candidate: str = "v4", champion: str = "v3") -> dict[str, Any]:
    """evaluation.json with these counts."""
    from trainer.evaluate import count

    results = [
        {"preference_id": str(n), "difference": d} for n, d in enumerate([1.0] * wins + [0.0] * ties + [-1.0] * losses)
    ]
    return {
        **count(results, 0.1),
        "skipped_over_long": 0,
        "candidate": candidate,
        "champion": champion,
        "beta": 0.1,
        "precision": "fp32",
        "snapshot": "ab" * 32,
        "canaries": [],
        "examples": [
            {"question": "What is the largest ocean?", "champion": "It is big.", "candidate": "<script>x</script>"}
        ],
        "results": results,
    }


def made_run(
    runs_dir: Path, run_id: str = "run_20261122-231500_ab12", *, state: str = "finished", **changes: Any
) -> Run:
    """A run whose config.json has `changes`; one that has not finished has no verdict, evaluation nor training.json."""
    directory = runs_dir / run_id
    directory.mkdir(parents=True)
    config = {
        "run_id": run_id,
        "created_at": "2026-11-22T23:15:00.000+00:00",
        "recipe": load_recipe("dpo-lora").as_dict(),
        "recipe_name": "dpo-lora",
        "seed": 7,
        "num_processes": 1,
        "max_steps": None,
        "practice": None,
        "base": {"name": "tiny", "gguf": "tiny.gguf", "directory": None, "hub_id": None},
        "models_dir": "models",
        "snapshot": {
            "hash": "ab" * 32,
            "directory": "snapshot",
            "train_rows": 192,
            "held_out_rows": 21,
            "counts": {"pick": 113, "trl": 100},
            "planned_steps": STEPS,
        },
        "device": "cpu",
        "requested_by": "local",
    }
    write_json(directory / "config.json", {**config, **changes})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of()), encoding="utf-8")
    (directory / "log.txt").write_text("\n$ python -m accelerate.commands.launch -m trainer.job here\nLoading\n")
    record: dict[str, Any] = {"state": state, "updated_at": 1.0, "finished_at": "2026-11-22T23:40:00+00:00"}
    if state == "finished":
        evaluation = evaluation_of(64, 12, 44)
        write_json(directory / "evaluation.json", evaluation)
        validation = {"pairs": 10, "every_steps": 8, "prompts": [], "best_step": 24, "stopped_at": None}
        facts = {"steps": STEPS, "pairs": 182, "dropped_over_long": 0, "validation": validation}
        write_json(directory / "training.json", {**facts, "first_loss": math.log(2), "last_loss": 0.5})
        verdict = decide(evaluation, "v3", "v4").as_dict()
        record |= {"version": "v4", "candidate": "v4", "champion": "v3", "verdict": verdict}
    elif state == "failed":
        record["error"] = "The training failed: <b>RuntimeError</b>: not enough memory\nLast lines of its log:\nx"
    elif state == "training":
        del record["finished_at"]
    write_json(directory / "state.json", record)
    return Run(directory)
