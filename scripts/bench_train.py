"""Our DPO step against TRL's DPOTrainer on real pairs: speed, memory, first step → docs/benchmarks/train.md.

    make bench-train            (scripts/bench_train.py --short for a look, on a tiny model and made-up pairs)

The pairs are UltraFeedback's (`--data`, read at run time, kept nowhere), the same ones for every variant; the model is
the embedded one with a LoRA adapter on all linear layers. Each measurement (`train_measurements.py`) is a process of
its own; a round goes through all variants in turn, medians over rounds are told. `--raw FILE` keeps the measurements
and goes on from there. `--gpu` measures a random model in Mistral-7B's shape instead. It was never run: no GPU was at
hand.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train_measurements import BATCH, ROOT, gpu, incremental, measure, real_pairs

from trainer.base_model import embedded, ensure_base

REPORT = ROOT / "docs" / "benchmarks" / "train.md"
DATA = ROOT.parent / "shared" / "data" / "ultrafeedback" / "trl_train_1000.jsonl"
KNOWN, NEW = 10_000, 500
VARIANTS: dict[str, tuple[str, str]] = {
    "ours, fp32": ("ours", "fp32"),
    "ours, bf16": ("ours", "bf16"),
    "TRL defaults, bf16": ("defaults", "bf16"),
    "TRL defaults, fp32": ("defaults", "fp32"),
    "TRL tuned, bf16": ("tuned", "bf16"),
    "TRL tuned, fp32": ("tuned", "fp32"),
}
SHORT = ("ours, fp32", "TRL defaults, fp32", "TRL tuned, fp32", "incremental")
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


# Rounds and the report


def child(part: str, setting: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own. Raises RuntimeError with the end of its output."""
    command = [sys.executable, __file__, "--child", part, json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **QUIET})
    if done.returncode:
        raise RuntimeError(f"{part} failed:\n{done.stderr[-3000:]}")
    return {"part": part, **json.loads(done.stdout.splitlines()[-1])}


def run_child(part: str, setting: dict[str, Any]) -> dict[str, Any]:
    """What `child` starts."""
    base_dir = Path(setting["base_dir"])
    if setting["short"]:
        import tiny_model

        pairs = tiny_model.made_up_preferences(setting["pairs"])
    else:
        pairs = real_pairs(Path(setting["data"]), setting["pairs"])
    if part == "incremental":
        return incremental(base_dir, pairs, setting["known"], setting["new"])
    return measure(*VARIANTS[part], base_dir, pairs)


def report(found: list[dict[str, Any]], setting: dict[str, Any], out: Path) -> None:
    """Write the medians, their ratios, and what was worked out from what."""

    def median(part: str, *keys: str) -> float:
        return statistics.median(sum(one[key] for key in keys) for one in found if one["part"] == part)

    def rounds(part: str) -> int:
        return sum(one["part"] == part for one in found)

    lines = [
        "| variant | rounds | s a pair, training | reference first, s a pair | CPU s a pair, both | peak memory, MB "
        "| first loss | margin after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in [part for part in VARIANTS if rounds(part)]:
        each = [one["train_s"] for one in found if one["part"] == part]
        lines.append(
            f"| {part} | {len(each)} | {statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f}) "
            f"| {median(part, 'reference_s'):.2f} | {median(part, 'train_cpu_s', 'reference_cpu_s'):.2f} "
            f"| {median(part, 'peak_mb'):.0f} | {median(part, 'first_loss'):.5f} | {median(part, 'margin'):.4f} |"
        )
    lines += [
        "",
        "| ours against | references known: time | CPU time | references counted too: time | CPU time | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    both = ("train_s", "reference_s"), ("train_cpu_s", "reference_cpu_s")
    for part, (kind, precision) in VARIANTS.items():
        for own in [own for own in ("ours, fp32", "ours, bf16") if kind != "ours" and rounds(own) and rounds(part)]:
            equal = "" if own.endswith(precision) else ", another precision"
            known = [median(part, *keys) / median(own, keys[0]) for keys in both]
            counted = [median(part, *keys) / median(own, *keys) for keys in both]
            memory = median(own, "peak_mb") / median(part, "peak_mb")
            ratios = " | ".join(f"{one:.1f}x" for one in (*known, *counted))
            lines.append(f"| {part} ({own}{equal}) | {ratios} | {memory:.2f}x |")
    if rounds("incremental") and rounds("TRL tuned, fp32") and not setting["short"]:
        lines += ["", *_to_the_first_step(median, found)]
    head = (
        f"`make bench-train`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{setting['pairs']} {'made-up pairs on a tiny model' if setting['short'] else 'UltraFeedback pairs'} a round, "
        f"{BATCH} pairs a step, LoRA r16 on all linear layers. {setting['note']}".rstrip()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(["# A DPO step", "", head, "", *lines, "", NOTES]) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def _to_the_first_step(median: Callable[..., float], found: list[dict[str, Any]]) -> list[str]:
    """`NEW` pairs on top of `KNOWN`: what was measured, and what was multiplied out."""
    one = next(entry for entry in found if entry["part"] == "incremental")
    reference, step = median("ours, fp32", "reference_s"), BATCH * median("ours, fp32", "train_s")
    ours = median("incremental", "ready_s") + (NEW - one["new"]) * reference + step
    trl = (KNOWN + NEW) * median("TRL tuned, fp32", "reference_s") + BATCH * median("TRL tuned, fp32", "train_s")
    each = median("TRL tuned, fp32", "reference_s")
    ready = median("incremental", "ready_s")
    return [
        f"**{NEW} new pairs on top of {KNOWN:,} known ones, to the end of the first optimizer step, fp32:",
        f"{ours:.0f} s, TRL's precompute {trl:.0f} s: {trl / ours:.0f}x sooner.**",
        f"Measured: {one['known']:,} known and {one['new']} new pairs made ready in {ready:.0f} s (tokens, cache,",
        f"references). Multiplied out: ours for the other {NEW - one['new']} references at {reference:.2f} s each,",
        f"TRL's for all {KNOWN + NEW:,} at {each:.2f} s each, as measured above.",
    ]


NOTES = """Every measurement is a process of its own and logs each step. *TRL defaults*: fp32 weights, activations
recomputed, batches of 8 padded to the longest, the reference in every step; bf16 is autocast, TRL's default.
*TRL tuned*: reference precomputed (its time counted), no recompute, 2 pairs at a time, sorted by length. *Ours*: the
product's own trainer, weights in the precision named. *References known* is the state of every retrain but the first
on a pair; TRL's are counted always, for a new pair throws its cache away. CPU time is of all threads: it hangs less
on what else the machine does. *First loss* must be 0.69315; *margin after*: the last step's mean reward margin."""


def main() -> None:
    """All rounds, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tiny model, made-up pairs, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=16, help="a round and variant")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--models", type=Path, default=ROOT / "data" / "models", help="where the base is, or will be")
    parser.add_argument("--only", nargs="*", help="these variants")
    parser.add_argument("--raw", type=Path, help="JSON lines of measurements to add to")
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--note", default="", help="a sentence for the head of the report")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(options.child[0], json.loads(options.child[1]))))
        return
    if options.gpu:
        print(json.dumps(gpu(steps=4), indent=2))
        return
    if not options.short and not options.data.is_file():
        sys.exit(
            f"{options.data} is not there. Name UltraFeedback pairs (JSON lines: prompt, chosen, rejected) with --data."
        )
    setting = {"short": options.short, "pairs": 16 if options.short else options.pairs, "data": str(options.data)}
    setting |= {"known": 100, "new": 4} if options.short else {"known": KNOWN, "new": 16}
    if options.short:
        import tiny_model

        setting["base_dir"] = str(tiny_model.shared_directory())
    else:
        setting["base_dir"] = str(ensure_base(embedded(), options.models))
    found = (
        [json.loads(line) for line in options.raw.read_text().splitlines()]
        if options.raw and options.raw.exists()
        else []
    )
    parts = options.only or ([*SHORT] if options.short else [*VARIANTS, "incremental"])
    for _ in range(1 if options.short else options.rounds):
        for part in parts:
            found.append(child(part, setting))
            print(json.dumps(found[-1]), flush=True)
            if options.raw:
                with options.raw.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    report(found, {**setting, "note": options.note}, options.out)


if __name__ == "__main__":
    main()
