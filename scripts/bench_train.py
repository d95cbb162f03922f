"""Our DPO step against TRL's DPOTrainer on real pairs: speed, memory, first step → docs/benchmarks/train.md.

    make bench-train            (scripts/bench_train.py --short for a look, on a tiny model and made-up pairs)

The pairs are UltraFeedback's (`--data`, read at run time, kept nowhere), the same ones for every variant; the model is
the embedded one with a LoRA adapter on all linear layers. Each measurement is a process of its own; a round goes
through all variants in turn, medians over rounds are told. `--raw FILE` keeps the measurements and goes on from there.
`--gpu` measures a random model in Mistral-7B's shape instead. It was never run: no GPU was at hand.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from feedback_store.records import Message, Preference  # noqa: E402
from trainer.base_model import embedded, ensure_base  # noqa: E402
from trainer.recipe import Recipe, load_recipe  # noqa: E402
from trainer.reference_cache import PairLogps, ReferenceCache, fingerprint, pair_key  # noqa: E402
from trainer.tokens import as_read, tokenise  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "train.md"
DATA = ROOT.parent / "shared" / "data" / "ultrafeedback" / "trl_train_1000.jsonl"
BATCH = 8
KNOWN, NEW = 10_000, 500
VARIANTS: dict[str, tuple[str, str]] = {
    "ours, fp32": ("ours", "fp32"),
    "ours, bf16": ("ours", "bf16"),
    "TRL defaults, bf16": ("defaults", "bf16"),
    "TRL defaults, fp32": ("defaults", "fp32"),
    "TRL tuned, bf16": ("tuned", "bf16"),
    "TRL tuned, fp32": ("tuned", "fp32"),
}
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


# What is measured, each in a child


def measure(kind: str, precision: str, base_dir: Path, pairs: Sequence[Preference]) -> dict[str, float]:
    """Seconds a pair of training and of the reference before it, peak memory, first loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, reference = (_ours if kind == "ours" else _trl)(kind, precision, base_dir, pairs, Path(folder))
        with _timed() as training:
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "train_s": training["wall"] / len(pairs),
        "train_cpu_s": training["cpu"] / len(pairs),
        "reference_s": reference["wall"] / len(pairs),
        "reference_cpu_s": reference["cpu"] / len(pairs),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": float(losses[0]),
        "margin": float(trainer.state.log_history[-2]["rewards/margins"]),
    }


def incremental(base_dir: Path, pairs: Sequence[Preference], known: int, new: int) -> dict[str, float]:
    """Seconds from preferences to a trainer that is ready to step, when all but `new` references are known."""
    from transformers import AutoTokenizer

    made = [_numbered(pairs[number % len(pairs)], number) for number in range(known + new)]
    recipe, tokenizer = _recipe("fp32"), AutoTokenizer.from_pretrained(base_dir)
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(Path(folder), fingerprint(base_dir, "torch.float32 autocast no cpu"))
        keys = [pair_key(tokenise(tokenizer, one, recipe.max_length)) for one in made[:known]]
        cache.append(dict.fromkeys(keys, PairLogps(-1.0, -1.0)))
        with _timed() as ready:
            trainer = _make(recipe, base_dir, made, _arguments(Path(folder), "fp32"), Path(folder))
    assert trainer.facts["references"] == {"cached": known, "computed": new}, trainer.facts
    return {"ready_s": ready["wall"], "ready_cpu_s": ready["cpu"], "known": known, "new": new}


def _ours(
    _kind: str, precision: str, base_dir: Path, pairs: Sequence[Preference], folder: Path
) -> tuple[Any, dict[str, float]]:
    from trainer.dpo_trainer import PairTrainer

    spent: dict[str, float] = {}
    PairTrainer.reference_logps = _clocked(PairTrainer.reference_logps, spent)
    trainer = _make(_recipe(precision), base_dir, pairs, _arguments(folder, precision, ours=True), folder)
    assert trainer.facts["fast_step"], trainer.facts
    return trainer, spent


def _trl(
    kind: str, precision: str, base_dir: Path, pairs: Sequence[Preference], folder: Path
) -> tuple[Any, dict[str, float]]:
    """TRL as it comes, or tuned: reference first (and counted), no recompute, two pairs at a time of like length."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    spent = {"wall": 0.0, "cpu": 0.0}
    tuned: dict[str, Any] = {}
    recipe, tokenizer = _recipe(precision), AutoTokenizer.from_pretrained(base_dir)
    if kind == "tuned":
        pairs = sorted(pairs, key=lambda one: tokenise(tokenizer, one, recipe.max_length).total)
        tuned = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": BATCH // 2,
            "activation_checkpointing": False,
            "precompute_ref_log_probs": True,
        }
        DPOTrainer._precompute_ref_logps = _clocked(DPOTrainer._precompute_ref_logps, spent)
    read = [as_read(tokenizer, one) for one in pairs]
    rows = [
        {
            "prompt": [dict(message) for message in one.prompt],
            "chosen": [{"role": "assistant", "content": one.chosen}],
            "rejected": [{"role": "assistant", "content": one.rejected}],
        }
        for one in read
    ]
    adapter = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules="all-linear")
    trainer = DPOTrainer(
        model=str(base_dir),
        args=_arguments(folder, precision, **tuned),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    return trainer, spent


def _arguments(folder: Path, precision: str, *, ours: bool = False, **others: Any) -> Any:
    """TRL's defaults but for what every variant shares: pairs a step, learning rate, logging, no files."""
    from trl import DPOConfig

    if ours:
        others |= {"activation_checkpointing": False}
        others |= {"model_init_kwargs": {"dtype": "bfloat16" if precision == "bf16" else "float32"}}
    recipe = _recipe(precision)
    return DPOConfig(
        **{
            "output_dir": str(folder / "checkpoints"),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "bf16": precision == "bf16",
            "beta": recipe.beta,
            "learning_rate": recipe.learning_rate,
            "max_length": recipe.max_length,
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **others,
        }
    )


def _make(recipe: Recipe, base_dir: Path, pairs: Sequence[Preference], arguments: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    from trainer.methods.dpo import make_trainer

    return make_trainer(
        recipe,
        pairs,
        base_dir=base_dir,
        tokenizer=AutoTokenizer.from_pretrained(base_dir),
        arguments=arguments,
        references=folder,
        report=lambda _done, _all: None,
    )


def _recipe(precision: str) -> Recipe:
    return replace(load_recipe("dpo-lora"), precision=precision, batch_size=BATCH)


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _clocked(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def clocked(*args: Any, **others: Any) -> Any:
        with _timed() as one:
            result = function(*args, **others)
        spent.update({key: spent.get(key, 0.0) + value for key, value in one.items()})
        return result

    return clocked


# The pairs


def real_pairs(path: Path, count: int, seed: int = 0) -> list[Preference]:
    """`count` pairs of the file with two different answers, drawn at random; prompts must leave room for an answer."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    usable = [row for row in rows if row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]]
    fitting = [row for row in usable if len(row["prompt"]) < 2500]
    return [
        _preference(row["prompt"], row["chosen"], row["rejected"], number)
        for number, row in enumerate(random.Random(seed).sample(fitting, count))
    ]


def _preference(prompt: str, chosen: str, rejected: str, number: int) -> Preference:
    import tiny_model

    empty = tiny_model.made_up_preferences(1)[0]
    message = Message(role="user", content=prompt)
    return replace(empty, preference_id=f"p{number}", prompt=(message,), chosen=chosen, rejected=rejected)


def _numbered(pair: Preference, number: int) -> Preference:
    message = Message(role="user", content=f"{pair.prompt[0]['content']} ({number})")
    return replace(pair, preference_id=f"p{number}", prompt=(message,))


# A random model in the shape of Mistral 7B, on a GPU


def gpu(steps: int) -> dict[str, float]:
    """Pairs a second of both steps in bf16 on UltraFeedback-like lengths, and the matmul peak of the chip.

    Written for one GPU with 80 GB or more. Never run.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    from trainer.dpo_trainer import PairTrainer, StockTrainer
    from trainer.tokens import PairTokens

    dice = random.Random(0)
    lengths = [[max(4, int(dice.lognormvariate(mean, 0.7))) for mean in (4.8, 5.4, 5.3)] for _ in range(32 * steps)]
    ids = [[[dice.randrange(3, 32000) for _ in range(min(length, 500))] for length in row] for row in lengths]
    rows = [(PairTokens(*row), 1.0) for row in ids]
    tokenizer = AutoTokenizer.from_pretrained(ensure_base(embedded(), ROOT / "data" / "models"))
    found: dict[str, float] = {"matmul_tflops": _matmul_peak()}
    for name, trainer_class, extra in (
        ("ours", PairTrainer, {"tokens_per_batch": 16384}),
        ("stock", StockTrainer, {"why": "the baseline"}),
    ):
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(MistralConfig(), dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            arguments = _arguments(Path(folder), "bf16", use_cpu=False, per_device_train_batch_size=32)
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = trainer_class(
                model=model, args=arguments, rows=rows, processing_class=tokenizer, peft_config=adapter, **extra
            )
            if name == "ours":
                trainer.add_references(ReferenceCache(Path(folder), "random"), lambda _done, _all: None)
            torch.cuda.reset_peak_memory_stats()
            with _timed() as spent:
                trainer.train()
                torch.cuda.synchronize()
        tokens = sum(pair.total for pair, _ in rows)
        found |= {
            f"{name}_pairs_per_s": len(rows) / spent["wall"],
            f"{name}_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            f"{name}_tflops": 4 * 7.1e9 * tokens / spent["wall"] / 1e12,
        }
        del trainer, model
    return found


def _matmul_peak() -> float:
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    with _timed() as spent:
        for _ in range(50):
            left @ right
        torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / spent["wall"] / 1e12


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
    if rounds("incremental") and rounds("TRL tuned, fp32"):
        lines += ["", *_to_the_first_step(median, found)]
    head = (
        f"`make bench-train`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{setting['pairs']} {'made-up pairs on a tiny model' if setting['short'] else 'UltraFeedback pairs'} a round, "
        f"{BATCH} pairs a step, LoRA r16 on all linear layers."
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
    parser.add_argument("--only", nargs="*", default=[*VARIANTS, "incremental"], help="these variants")
    parser.add_argument("--raw", type=Path, help="JSON lines of measurements to add to")
    parser.add_argument("--out", type=Path, default=REPORT)
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
    found = [json.loads(line) for line in options.raw.read_text().splitlines()] if options.raw else []
    for _ in range(1 if options.short else options.rounds):
        for part in options.only:
            found.append(child(part, setting))
            print(json.dumps(found[-1]), flush=True)
            if options.raw:
                with options.raw.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    report(found, setting, options.out)


if __name__ == "__main__":
    main()
