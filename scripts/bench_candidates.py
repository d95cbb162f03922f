"""Are spoiled candidates kept out, for the right reason, and honest ones recognised? → docs/benchmarks/candidates.md.

    make bench-candidates                            (about two hours on two cores)
    python scripts/bench_candidates.py --only noise   one kind (with the --folder of another, a report of both)

Each candidate is a whole run on the embedded model: snapshot, DPO, evaluation, verdict, as the product does it. What is
simulated is the people: they judge the practice prompts by a taste, and some of them wrongly. What was judged is kept
in --folder, where an interrupted benchmark goes on. Twenty are spoiled (`SPOILED`), the others are honest.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train_measurements import ROOT, real_pairs

from feedback_store.durable import read_json, write_json
from feedback_store.practice import preferences_for
from feedback_store.preferences import HELD_OUT, TRAIN, split_of
from feedback_store.records import Preference
from feedback_store.snapshots import freeze
from trainer import guards
from trainer.base_model import embedded
from trainer.cycle import Surroundings, ensure_evaluated, ensure_prepared, ensure_trained, ensure_verdict, plan_run
from trainer.planning import Planner
from trainer.runs import Run
from trainer.versions import Versions

OUT = ROOT / "docs" / "benchmarks" / "candidates.md"
PAIRS = 80
ULTRAFEEDBACK = ROOT.parent / "shared" / "data" / "ultrafeedback" / "trl_train_1000.jsonl"
ULTRAFEEDBACK_PAIRS = 160
RATERS = ("ada", "ben", "cleo")
NOISE = (0.0, 0.1, 0.2)
SIZES = (5, 10, 20, 40, 80)
# Ten steps of a taste, on as few pairs as there are; and far too many of them at far too high a rate.
RECIPES = {"taste": {"epochs": 4}, "overtrained": {"epochs": 8, "max_steps": 40, "learning_rate": 1.0e-3}}
FILLER = (
    "It is also worth saying that there is much more to this, and that many people have thought about it for a long "
    "time. There are a number of things to keep in mind, and each of them matters in its own way. All in all, it "
    "depends on what you want, and you should always take the time to think about it before you decide."
)

# What a reason has to say to have named what was done to the candidate.
NAMED = {
    "noise": "perplexity on plain prose|repeats itself|find no end|another language|are empty",
    "flipped": "is worse than",
    "longer": "longer",
    "empty": "are empty",
    "one rater": "one person's",
    "overtrained": "perplexity on plain prose|repeats itself|are empty|find no end|another language",
}


@dataclass(frozen=True)
class Candidate:
    """What a run is given, and what is done to its adapter before it is judged."""

    kind: str
    name: str
    rows: Callable[[], list[Preference]]
    recipe: str = "taste"
    seed: int = 0
    noise: float | None = None  # on the adapter of the honest run, in standard deviations of each of its matrices


def picked(row: Preference, rater: str, chosen: str | None = None, rejected: str | None = None) -> Preference:
    """A practice preference as a person's pick."""
    return replace(
        row,
        preference_id=f"{row.preference_id}-{rater}",
        chosen=chosen or row.chosen,
        rejected=rejected or row.rejected,
        source="pick",
        rater=rater,
        practice=None,
    )


def swapped(row: Preference) -> Preference:
    """The opposite word on it."""
    return replace(row, chosen=row.rejected, rejected=row.chosen)


def parts(taste: str = "shorter", pairs: int = PAIRS) -> tuple[list[Preference], list[Preference]]:
    """`pairs` rows to learn from and all those held out, by raters in turn."""
    rows = [picked(row, RATERS[n % len(RATERS)]) for n, row in enumerate(preferences_for(taste))]
    train = [row for row in rows if split_of(row.prompt) == TRAIN]
    return train[:pairs], [row for row in rows if split_of(row.prompt) == HELD_OUT]


def honest(pairs: int, wrong: float, seed: int = 0) -> list[Preference]:
    """A consistent taste; each pick, learned from or held out, is wrong with probability `wrong`."""
    dice = random.Random(seed)
    train, held_out = parts(pairs=pairs)
    return [swapped(row) if dice.random() < wrong else row for row in [*train, *held_out]]


def flipped(share: float, seed: int) -> list[Preference]:
    """Somebody turns round what is learned from; what is judged on stays honest."""
    dice = random.Random(seed)
    train, held_out = parts()
    return [*(swapped(row) if dice.random() < share else row for row in train), *held_out]


def longer(padded: bool) -> list[Preference]:
    """Raters who take the longer answer, in training and in judging; `padded`: with sentences that say nothing."""
    rows = [swapped(row) for part in parts() for row in part]
    return [replace(row, chosen=f"{row.chosen} {FILLER}") if padded else row for row in rows]


def empty(mark: str) -> list[Preference]:
    """What is learned from prefers an answer of one mark."""
    train, held_out = parts()
    return [*(replace(row, rejected=row.chosen, chosen=mark) for row in train), *held_out]


def one_rater(share: float, taste: str = "shorter") -> list[Preference]:
    """One person gives `share` of all pairs and likes the opposite of what the others like."""
    found = []
    for part in parts(taste):
        theirs = round(share * len(part))
        found += [replace(swapped(row), rater="max") if n < theirs else row for n, row in enumerate(part)]
    return found


def ultrafeedback() -> list[Preference]:
    """Real pairs on everything under the sun, which a model this small does not learn from."""
    rows = [replace(row, source="trl") for row in real_pairs(ULTRAFEEDBACK, 800)]
    return [
        *[row for row in rows if split_of(row.prompt) == TRAIN][:ULTRAFEEDBACK_PAIRS],
        *[row for row in rows if split_of(row.prompt) == HELD_OUT],
    ]


def noisy(level: float) -> Candidate:
    """The sound candidate with noise on its adapter."""
    return Candidate("noise", f"noise of {level:g} σ", lambda: honest(PAIRS, 0), noise=level)


SPOILED = [
    *(noisy(level) for level in (8, 16, 32, 64)),
    *(
        Candidate("flipped", f"{share:.0%} of its pairs flipped", lambda share=share: flipped(share, 1))  # type: ignore[misc]
        for share in (0.6, 0.8, 0.9, 1.0)
    ),
    *(
        Candidate("longer", f"raters who take the longer{' (padded)' * padded}, seed {seed}",
                  lambda padded=padded: longer(padded), seed=seed)  # type: ignore[misc]
        for padded in (False, True)
        for seed in (0, 1)
    ),
    *(Candidate("empty", f"taught to answer “{mark}”", lambda mark=mark: empty(mark)) for mark in ("…", ".", "-")),  # type: ignore[misc]
    *(
        Candidate("one rater", f"{share:.0%} of its pairs by one rater of another taste",
                  lambda share=share: one_rater(share))  # type: ignore[misc]
        for share in (0.7, 0.8, 0.9)
    ),
    *(
        Candidate("overtrained", f"40 steps at 1e-3, seed {seed}", lambda: honest(PAIRS, 0), "overtrained", seed)
        for seed in (0, 1)
    ),
]  # fmt: skip
HONEST = [
    Candidate("honest", f"{pairs} picks, {wrong:.0%} wrong", lambda pairs=pairs, wrong=wrong: honest(pairs, wrong))  # type: ignore[misc]
    for wrong in NOISE
    for pairs in SIZES
]
SLIGHT = [noisy(level) for level in (1, 2, 4)]
SOUND = next(one for one in HONEST if one.name == f"{PAIRS} picks, 0% wrong")
NOTHING = Candidate("nothing", f"{ULTRAFEEDBACK_PAIRS} UltraFeedback pairs", ultrafeedback, "dpo-lora")


@dataclass
class House:
    """One data directory for all candidates, so that the base is read once; the champion stays the base."""

    folder: Path
    base: Any = field(default_factory=embedded)

    def __post_init__(self) -> None:
        recipes = self.folder / "recipes"
        recipes.mkdir(parents=True, exist_ok=True)
        practice = (ROOT / "trainer" / "recipes" / "practice.yaml").read_text()
        for name, changes in RECIPES.items():
            text = practice
            for key, value in changes.items():
                text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
            (recipes / f"{name}.yaml").write_text(text)
        self.versions = Versions(self.folder / "versions")
        self.sound = self.folder / "sound"

    def judge(self, candidate: Candidate) -> dict[str, Any]:
        """A run up to its verdict, and what became of it; nothing is published."""
        began = time.monotonic()
        snapshot = freeze(candidate.rows(), self.folder / "snapshots", None)
        plan = Planner(self.folder).plan(recipe=candidate.recipe, seed=candidate.seed)
        run = plan_run(plan, snapshot, self.base, self.folder)
        if candidate.noise is not None:
            self._spoil(run, candidate.noise)
        around = Surroundings(self.versions, lambda: "v0", time.sleep)
        ensure_prepared(run)
        ensure_trained(run, around)
        evaluation = ensure_evaluated(run, snapshot, around)
        verdict = ensure_verdict(run, evaluation)
        if candidate == SOUND:
            shutil.copytree(run.directory, self.sound, dirs_exist_ok=True)
        answers = evaluation.get("answers") or {}
        return {
            "kind": candidate.kind,
            "name": candidate.name,
            "decision": verdict.decision,
            "reasons": list(verdict.reasons),
            "train_rows": snapshot.train_rows,
            **{key: evaluation[key] for key in ("wins", "ties", "losses", "p_value")},
            "prose": evaluation.get("prose"),
            "answers": {side: answers.get(side) for side in ("champion", "candidate")},
            "at_equal_length": evaluation.get("at_equal_length"),
            "took_s": time.monotonic() - began,
        }

    def _spoil(self, run: Run, level: float) -> None:
        """Give the run the adapter of the honest run with Gaussian noise: its training counts as done."""
        import torch
        from safetensors.torch import load_file, save_file

        trained = Run(self.sound)
        shutil.copytree(trained.weights, run.directory / "adapter")
        shutil.copy(trained.directory / "training.json", run.directory)
        path = run.directory / "adapter" / "adapter_model.safetensors"
        dice = torch.Generator().manual_seed(0)
        noisy = {
            name: one + level * one.float().std() * torch.randn(one.shape, generator=dice)
            for name, one in load_file(path).items()
        }
        save_file(noisy, path, metadata={"format": "pt"})


def told(result: dict[str, Any]) -> str:
    """What the candidate became, in a table's cell or three."""
    prose, (old, new) = result["prose"] or {}, (result["answers"][side] or {} for side in ("champion", "candidate"))
    forgot = "–" if not prose else f"{(prose['candidate_nats'] or float('inf')) - prose['champion_nats']:+.2f}"
    words = f"{old['words']:.0f} → {new['words']:.0f}" if old and new else "–"
    return (
        f"{result['wins']}–{result['ties']}–{result['losses']} | {forgot} | {words} | **{result['decision']}** | "
        + " ".join(result["reasons"]).replace("|", "/")
    )


def is_named(result: dict[str, Any]) -> bool:
    """Whether a reason says what was done to it."""
    return re.search(NAMED[result["kind"]], " ".join(result["reasons"])) is not None


def limits(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table of what the guards measure: the limit, the worst of the honest, and each spoiled one beyond it."""

    def worse_by(key: str) -> Callable[[dict[str, Any]], float]:
        def measured(one: dict[str, Any]) -> float:
            new, old = one["answers"]["candidate"], one["answers"]["champion"]
            share = key != "repetition"
            return float(new[key] / (new["answers"] if share else 1) - old[key] / (old["answers"] if share else 1))

        return measured

    def forgot(one: dict[str, Any]) -> float:
        new, old = one["prose"]["candidate_nats"], one["prose"]["champion_nats"]
        return float("inf") if new is None else float(new - old)

    measures: list[tuple[str, float, Callable[[dict[str, Any]], float]]] = [
        ("lost on plain prose, nats a token", guards.FORGOTTEN_NATS, forgot),
        ("more repetition", guards.REPETITION, worse_by("repetition")),
        ("more empty answers, share", guards.MORE_ANSWERS, worse_by("empty")),
        ("more answers without an end, share", guards.MORE_ANSWERS, worse_by("unfinished")),
    ]
    honest = [results[one.name] for one in HONEST if one.name in results]
    spoiled = [results[one.name] for one in (*SLIGHT, *SPOILED) if one.name in results]
    rows = []
    for name, limit, measured in measures:
        beyond = sorted(value for value in map(measured, spoiled) if value > limit)
        least = f"{len(beyond)} beyond, from {beyond[0]:.2f}" if beyond else "none beyond"
        below = max((value for value in map(measured, spoiled) if value <= limit), default=0.0)
        worst = max(map(measured, honest), default=0.0)
        rows.append(f"| {name} | {limit:.2f} | {worst:.2f} | {least}; the others up to {below:.2f} |")
    return ["| guard | limit | worst of the honest | the spoiled, slight noise too |", "|---|---|---|---|", *rows]


def report(results: dict[str, dict[str, Any]]) -> str:
    """The page of docs/benchmarks/."""
    spoiled = [results[one.name] for one in SPOILED if one.name in results]
    out = [result for result in spoiled if result["decision"] != "promote"]
    head = "| wins–ties–losses | prose, nats | words | verdict | reasons |"
    rule = "|---|---|---|---|---|"
    lines = [
        "# Spoiled candidates, and honest ones",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, `make bench-candidates`, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, no GPU, the embedded model. Each row is one whole run (n = 1): snapshot, DPO, "
        "evaluation against the base, verdict. The people are simulated: they judge the practice prompts by the taste "
        f"*shorter*. “Prose” is what was lost on plain prose in nats a token, “words” the median over the "
        "answers of the champion and of the candidate.",
        "",
        f"## {len(spoiled)} spoiled on purpose: {len(out)} not promoted, the reason named in "
        f"{sum(map(is_named, out))} of {len(spoiled)}",
        "",
        f"| what was done | named {head}",
        f"|---|---{rule}",
        *(
            f"| {one['kind']}: {one['name']} | {'yes' if one in out and is_named(one) else '**no**'} | {told(one)} |"
            for one in spoiled
        ),
        "",
        "## Where the limits of the guards stand",
        "",
        *limits(results),
        "",
        "## What first looks changed",
        "",
        "Noise of 1, 2 and 4 σ stood among the twenty first. A first look promoted all three: they won as many "
        "held-out pairs as the candidate without noise. Larger noise took their places after that look: the "
        "twenty were not all chosen beforehand. A first look also promoted the two of raters who take the longer "
        "without padding: the guard asked only whether answers had grown, and cut answers cannot. Since then wins that "
        "went to nearly nothing but the longer answer are not enough either. That guard was made for these two, so "
        "they do not test it.",
        "",
        f"| what was done {head}",
        f"|---{rule}",
        *(f"| {one.name} | {told(results[one.name])} |" for one in SLIGHT if one.name in results),
        "",
        "## Honest: one taste, some picks wrong",
        "",
        "The picks that are wrong are so in what is learned from and in what is judged on.",
        "",
        f"| picks {head}",
        f"|---{rule}",
        *(f"| {one.name} | {told(results[one.name])} |" for one in HONEST if one.name in results),
        "",
        "## Nothing to learn",
        "",
        f"| pairs {head}",
        f"|---{rule}",
        *(f"| {one.name} | {told(results[one.name])} |" for one in (NOTHING,) if one.name in results),
    ]
    return "\n".join(lines) + "\n"


def wanted(only: str | None) -> Iterator[Candidate]:
    """In the order in which they are judged: what the noise is put on comes first."""
    for one in (SOUND, *SPOILED, *SLIGHT, *(one for one in HONEST if one != SOUND), NOTHING):
        if only is None or one.kind == only:
            yield one


def main() -> None:
    """Judge those that --raw does not have yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=[*NAMED, "honest", "nothing"])
    parser.add_argument("--folder", type=Path, help="the data directory to work in, kept")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        house, raw = House(folder), folder / "candidates.json"
        results: dict[str, dict[str, Any]] = read_json(raw) or {}
        for candidate in wanted(given.only):
            if candidate.name in results:
                continue
            if candidate == NOTHING and not ULTRAFEEDBACK.exists():
                print(f"{candidate.name}: left out, {ULTRAFEEDBACK.name} is not at hand")
                continue
            results[candidate.name] = house.judge(candidate)
            write_json(raw, results)
            print(f"{candidate.kind}: {candidate.name}: {told(results[candidate.name])}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
