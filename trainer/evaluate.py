"""CHILD: candidate against champion on held-out pairs → evaluation.json.

A pair is a win where the candidate favours `chosen` over `rejected` more than the champion does: the sign of the DPO
margin with the champion as the reference. Within `TIE_NATS` it is a tie. The base is a champion too (adapter off).
Beside it, `canaries.py` records how the candidate begins its answers, for whoever will serve it.
Started by `launch.py`; by hand: `python -m trainer.evaluate RUN_DIR`, which reads RUN_DIR/comparison.json.

Not covered: generated answers, length-controlled win rates, judges (the full gate is later work).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, write_json
from feedback_store.errors import StoreError
from feedback_store.records import Preference
from feedback_store.snapshots import load_preferences
from trainer.base_model import BaseModel, ensure_base
from trainer.canaries import record_canaries
from trainer.errors import JobError, TrainerError
from trainer.tokens import PairTokens, tokenise

TIE_NATS = 1e-3
# PEFT matches adapter names by substring: neither of these is part of the other, nor of a module's name.
CANDIDATE, CHAMPION = "candidate", "champion"


def evaluate(run_dir: Path, comparison: dict[str, Any]) -> dict[str, Any]:
    """Score every pair with both versions. `comparison` is comparison.json, written by `cycle.py`."""
    held_out, skipped = load_preferences(Path(comparison["held_out"])), 0
    rows = pick_pairs(held_out, comparison["held_out_pairs"])
    results: list[dict[str, Any]] = []
    canaries: list[dict[str, Any]] = []
    if rows or comparison["candidate"]["adapter"]:
        scorer = _Scorer(comparison)
        canaries = scorer.canaries()
        since = time.time()
        for preference in rows:
            difference = scorer.difference(preference)
            if difference is None:
                skipped += 1
            else:
                results.append({"preference_id": preference.preference_id, "difference": difference})
            _report(run_dir, since, len(results) + skipped, len(rows))
    return {
        **count(results, comparison["beta"]),
        "skipped_over_long": skipped,
        "held_out": len(held_out),
        "candidate": comparison["candidate"]["version"],
        "champion": comparison["champion"]["version"],
        "beta": comparison["beta"],
        "precision": comparison["precision"],
        "snapshot": comparison["snapshot"],
        "canaries": canaries,
        "results": results,
    }


def pick_pairs(preferences: Sequence[Preference], cap: int) -> list[Preference]:
    """At most `cap` pairs: own picks first, then by preference_id, so that the choice is the same every time."""
    return sorted(preferences, key=lambda p: (p.source != "pick", p.preference_id))[:cap]


def count(results: Sequence[dict[str, Any]], beta: float) -> dict[str, Any]:
    """Wins, ties, losses with the exact two-sided sign test and the 95% Clopper-Pearson interval of the win rate.

    `interval` is [low, high] of wins / (wins + losses); `mean_margin` is beta times the mean difference in nats.
    """
    from scipy.stats import binomtest

    wins = sum(result["difference"] > TIE_NATS for result in results)
    losses = sum(result["difference"] < -TIE_NATS for result in results)
    decided = wins + losses
    p_value, interval = 1.0, [0.0, 1.0]
    if decided:
        test = binomtest(wins, decided)
        bounds = test.proportion_ci(0.95, method="exact")
        p_value, interval = float(test.pvalue), [float(bounds.low), float(bounds.high)]
    return {
        "wins": wins,
        "ties": len(results) - decided,
        "losses": losses,
        "pairs": len(results),
        "p_value": p_value,
        "interval": interval,
        "win_rate": wins / decided if decided else None,
        "mean_margin": beta * sum(result["difference"] for result in results) / len(results) if results else None,
    }


class _Scorer:
    """The base with the adapters of both versions beside each other."""

    def __init__(self, comparison: dict[str, Any]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base_dir = ensure_base(BaseModel.from_dict(comparison["base"]), Path(comparison["models_dir"]))
        self._max_length = comparison["max_length"]
        self._device = _device(comparison["device"])
        self._tokenizer = AutoTokenizer.from_pretrained(base_dir)
        dtype = torch.bfloat16 if comparison["precision"] == "bf16" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
        adapters = {name: comparison[name]["adapter"] for name in (CANDIDATE, CHAMPION) if comparison[name]["adapter"]}
        model: Any = base
        for name, path in adapters.items():
            if model is base:
                model = PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                model.load_adapter(path, name)
        self._model = model.to(self._device).eval()
        self._adapters = set(adapters)

    def difference(self, preference: Preference) -> float | None:
        """How much more the candidate favours `chosen` than the champion does, in nats. None: prompt too long."""
        tokens = tokenise(self._tokenizer, preference, self._max_length)
        if not tokens.chosen or not tokens.rejected:
            return None
        return self._preference_of(CANDIDATE, tokens) - self._preference_of(CHAMPION, tokens)

    def canaries(self) -> list[dict[str, Any]]:
        """How the candidate begins its answers, for whoever will serve it; none of the base, which has no adapter."""
        if CANDIDATE not in self._adapters:
            return []
        self._model.set_adapter(CANDIDATE)
        return record_canaries(self._model, self._tokenizer)

    def _preference_of(self, name: str, tokens: PairTokens) -> float:
        if name in self._adapters:
            self._model.set_adapter(name)
            return self._favour(tokens)
        if not self._adapters:
            return self._favour(tokens)
        with self._model.disable_adapter():
            return self._favour(tokens)

    def _favour(self, tokens: PairTokens) -> float:
        """log p(chosen | prompt) - log p(rejected | prompt), summed over tokens, in one forward pass.

        Both answers stand behind one prompt in one row; a mask hides `chosen` from `rejected` and position ids start
        again after the prompt, which gives the same numbers as two passes with less work.
        """
        import torch

        layout = pair_layout(len(tokens.prompt), len(tokens.chosen), len(tokens.rejected))
        answers = tokens.chosen + tokens.rejected
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor([tokens.prompt + answers], device=self._device),
                position_ids=torch.tensor([layout.positions], device=self._device),
                attention_mask=torch.tensor(layout.visible, device=self._device)[None, None],
                logits_to_keep=torch.tensor(layout.predicting, device=self._device),
            ).logits[0]
            wanted = torch.tensor(answers, device=self._device)[:, None]
            each = torch.log_softmax(logits.float(), dim=-1).gather(-1, wanted).double()
        return float(each[: len(tokens.chosen)].sum() - each[len(tokens.chosen) :].sum())


@dataclass(frozen=True, slots=True)
class PairLayout:
    """How prompt + chosen + rejected lie in one row."""

    positions: list[int]
    visible: list[list[bool]]
    predicting: list[int]


def pair_layout(prompt: int, chosen: int, rejected: int) -> PairLayout:
    """The layout for these lengths in tokens: position of each token, who sees whom, and whose logits predict."""
    end = prompt + chosen
    row = range(end + rejected)
    return PairLayout(
        positions=[*range(end), *range(prompt, prompt + rejected)],
        visible=[[seen <= by and not (by >= end and prompt <= seen < end) for seen in row] for by in row],
        predicting=[*range(prompt - 1, end - 1), prompt - 1, *range(end, end + rejected - 1)],
    )


def _device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise JobError("This evaluation was started for a GPU but torch sees none. Check the driver and torch's build.")
    return "cuda"


def _report(run_dir: Path, since: float, done: int, total: int) -> None:
    progress = {"stage": "evaluating", "since": since, "evaluation": {"done": done, "total": total}}
    write_json(run_dir / "progress.json", {**progress, "time": time.time()})


def main() -> None:
    """`python -m trainer.evaluate RUN_DIR`."""
    run_dir = Path(sys.argv[1])
    try:
        comparison = read_json(run_dir / "comparison.json")
        if comparison is None:
            raise JobError(f"{run_dir} has no comparison.json: nothing says what to compare.")
        write_json(run_dir / "evaluation.json", evaluate(run_dir, comparison))
    except (TrainerError, StoreError) as error:
        write_json(run_dir / "failure.json", {"stage": "evaluating", "reason": str(error)})
        raise SystemExit(f"Stopped: {error}") from error


if __name__ == "__main__":
    main()
