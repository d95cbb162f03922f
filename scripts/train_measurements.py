"""What `bench_train.py` measures, each in a process of its own: our trainer, TRL's, a cache that knows most pairs."""

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from feedback_store.records import Message, Preference  # noqa: E402
from trainer.base_model import embedded, ensure_base  # noqa: E402
from trainer.recipe import Recipe, load_recipe  # noqa: E402
from trainer.reference_cache import PairLogps, ReferenceCache, fingerprint, pair_key  # noqa: E402
from trainer.tokens import as_read, tokenise  # noqa: E402

BATCH = 8


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
