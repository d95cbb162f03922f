"""Before a run starts: what it will take, whether that fits, and what becomes of the chat meanwhile.

`supervisor.py` asks before each run; the answer is kept in its config.json and compared with what happened in the run's
body. `estimate.py` counts; here the model's files, the snapshot and earlier runs are read. Imports no torch.

Refused is what certainly does not fit: where even the low end of the estimate is more than there is. The policy says
what a run does with the memory that the served model holds:

    share    train beside it
    pause    end it while the run goes on; chat is told when it comes back
    refuse   refuse a run that may not fit beside it
    auto     share on a CPU; on a GPU share where the estimate fits beside it, else pause

A recipe of several stages is the sum of them (`Recipe.stages`), as `job.py` trains them.

Not covered: texts in files, so that nothing is said, and dialogues in files, of which it is said that they come on top;
`zloop evaluate` by hand, which shares; the disk; memory that somebody else takes after the start; references that are
kept from an earlier run, which need no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedback_store.bounded import load_json
from feedback_store.preferences import HELD_OUT, TRAIN
from feedback_store.selection import RATED_TRAIN
from feedback_store.snapshots import Snapshot
from trainer.base_model import BaseModel
from trainer.estimate import Estimate, Past, Setting, Shape, Work, estimate_run
from trainer.launch import available_cores
from trainer.recipe import CONTINUED_PRETRAINING, DPO, KTO, SFT, TOKENS, Recipe
from trainer.room import Room
from trainer.runs import Run
from trainer.validation import MAX_PAIRS, MAX_SHARE, steps_between

if TYPE_CHECKING:
    from trainer.cycle import Plan

CHARACTERS_PER_TOKEN = 4.0  # English, by the embedded model's tokenizer
TEMPLATE_TOKENS = 32  # what a chat template puts around a conversation
ANSWERS = ("chosen", "rejected", "completion")


class Policy(StrEnum):
    AUTO = "auto"
    SHARE = "share"
    PAUSE = "pause"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Preflight:
    """The answer. `kind`: runs that one can learn from each other; `policy`: share or pause.

    `refusal` and `warning`: sentences, where the run does not fit or is near the limit. `estimate` and `work` are None
    where nothing is known of the model yet.
    """

    kind: str
    estimate: Estimate | None
    work: Work | None
    room: Room | None
    policy: Policy
    warning: str | None
    refusal: str | None
    beside: str = ""  # what comes on top and is not counted

    @property
    def sentence(self) -> str:
        """What a person reads beside the button."""
        if self.estimate is None:
            return "Time and memory are not known: the model is not here yet, of no known make, or it reads files."
        room = f"; {_gb(self.room.free_bytes)} of {_gb(self.room.total_bytes)} free" if self.room else ""
        paused = " The chat is paused meanwhile." if self.policy is Policy.PAUSE else ""
        what = self.room.what if self.room else "memory"
        about = f"About {minutes(self.estimate.total_s)}, {_gb(self.estimate.memory_bytes)} of {what}{room}."
        return f"{about}{paused}{self.beside}"

    def as_dict(self) -> dict[str, Any]:
        """What config.json keeps, and the body of POST /v1/preflight."""
        return {
            "kind": self.kind,
            "sentence": self.sentence,
            "estimate": self.estimate.as_dict() if self.estimate else None,
            "pairs": self.work.pairs if self.work else None,
            "steps": self.work.steps if self.work else None,
            "tokens": self.work.tokens if self.work else None,
            "room": self.room.as_dict() if self.room else None,
            "policy": self.policy.value,
            "warning": self.warning,
            "refusal": self.refusal,
        }


def preflight(
    plan: Plan,
    parts: Mapping[str, Any],
    base: BaseModel,
    models_dir: Path,
    *,
    runs: Iterable[Run],
    room: Room | None,
    policy: Policy,
    is_serving: bool,
    cores: int | None = None,
) -> Preflight:
    """`parts`: the rows to train on and those held out, as tables (`snapshots.preview`, `parts_of`).

    `runs`: earlier ones, newest first. `is_serving`: whether a served model could be paused.
    """
    if plan.launch.launcher != "local":
        room, policy, is_serving = None, Policy.SHARE, False  # its machines are not this one
    recipes = plan.recipe.stages()
    settings = [_setting(plan, recipe, cores or available_cores()) for recipe in recipes]
    setting = settings[-1]
    kind = kind_of(plan, setting, base.name)
    shape = shape_of(base, models_dir)
    if shape is None or not _learned_from(plan, parts).num_rows:
        paused = policy is Policy.PAUSE and is_serving
        return Preflight(kind, None, None, room, Policy.PAUSE if paused else Policy.SHARE, None, None)
    works = [work_of(recipe, plan.max_steps, parts) for recipe in recipes]
    past = [one for run in runs if (one := past_of(run, kind)) is not None]
    before = list(zip(works, settings, strict=True))[:-1]
    estimate = estimate_run(shape, works[-1], setting, past, before=before)
    chosen = choose_policy(policy, estimate, room, is_serving=is_serving, device=setting.device)
    warning: str | None
    if plan.launch.launcher == "local":
        warning, refusal = _judged(estimate, room, policy, chosen, is_serving=is_serving)
    else:
        warning = f"What the machines of {plan.launch.launcher} have is not known, so it was not checked."
        refusal = None
    beside = " The dialogues in files come on top of that: they are not counted." if plan.dialogues else ""
    return Preflight(kind, estimate, whole(works), room, chosen, warning, refusal, beside)


def kind_of(plan: Plan, setting: Setting, base: str) -> str:
    """Runs with the same text can learn from each other. What is counted otherwise than it once was has a new one."""
    counted = "" if plan.recipe.method == DPO and not plan.recipe.is_full else " 2"
    place = f"{setting.device}×{plan.num_processes} {setting.value_bytes}"
    return f"{plan.recipe.method} {setting.tuning} {base} {place}{counted}"


def choose_policy(policy: Policy, estimate: Estimate, room: Room | None, *, is_serving: bool, device: str) -> Policy:
    """Share or pause."""
    if not is_serving or policy in (Policy.SHARE, Policy.REFUSE):
        return Policy.SHARE
    if policy is Policy.PAUSE:
        return Policy.PAUSE
    if device == "cpu" or room is None or estimate.memory_high_bytes <= room.free_bytes:
        return Policy.SHARE
    return Policy.PAUSE


def shape_of(base: BaseModel, models_dir: Path) -> Shape | None:
    """The base's shape by its files; None for a model that is not here yet, is damaged, or of no known make."""
    if base.gguf is not None:
        return _shape_of_gguf(base.gguf, base.gguf.stat().st_mtime_ns) if base.gguf.is_file() else None
    directory = base.directory or models_dir / base.name
    try:
        said = load_json(directory / "config.json")
        heads = int(said["num_attention_heads"])
        head_size = int(said.get("head_dim") or said["hidden_size"] // heads)
        return Shape.of(
            layers=int(said["num_hidden_layers"]),
            hidden=int(said["hidden_size"]),
            feed_forward=int(said["intermediate_size"]),
            key_value=head_size * int(said.get("num_key_value_heads") or heads),
            vocabulary=int(said["vocab_size"]),
            tied=bool(said.get("tie_word_embeddings", False)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=4)
def _shape_of_gguf(path: Path, _changed_ns: int) -> Shape | None:
    from gguf import GGUFReader

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    try:
        reader = GGUFReader(path)
        name = value("general.architecture")
        heads, hidden = int(value(f"{name}.attention.head_count")), int(value(f"{name}.embedding_length"))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        return Shape.of(
            layers=int(value(f"{name}.block_count")),
            hidden=hidden,
            feed_forward=int(value(f"{name}.feed_forward_length")),
            key_value=hidden // heads * int(value(f"{name}.attention.head_count_kv") or heads),
            vocabulary=int(tensors["token_embd.weight"].shape[1]),
            tied="output.weight" not in tensors,
        )
    except (OSError, TypeError, ValueError, KeyError, IndexError):
        return None


def parts_of(snapshot: Snapshot) -> Mapping[str, Any]:
    """The rows of a frozen snapshot, as `preflight` takes them."""
    import pyarrow.parquet as pq

    parts = {TRAIN: pq.read_table(snapshot.train_path), HELD_OUT: pq.read_table(snapshot.held_out_path)}
    return parts if snapshot.rated_rows is None else {**parts, RATED_TRAIN: pq.read_table(snapshot.ratings_path)}


def _learned_from(plan: Plan, parts: Mapping[str, Any]) -> Any:
    """The table of what is learned; an empty one where that is in files whose lengths are not looked at."""
    if plan.recipe.method == CONTINUED_PRETRAINING:
        return parts[TRAIN].slice(0, 0)
    return parts[RATED_TRAIN] if plan.recipe.method == KTO else parts[TRAIN]


def work_of(recipe: Recipe, max_steps: int | None, parts: Mapping[str, Any]) -> Work:
    """How much one stage has to go through, by the lengths of the texts; `recipe` is that of the stage."""
    table = parts[RATED_TRAIN] if recipe.method == KTO else parts[TRAIN]
    rows = table.num_rows
    steps = recipe.total_steps(rows, max_steps)
    pairs = min(steps * recipe.batch_size, recipe.epochs * rows)
    prompts, answers = _lengths(table, recipe)
    together = zip(prompts, answers, strict=True)
    longest = max((sum(min(recipe.max_length, prompt + one) for one in row) for prompt, row in together), default=0)
    each = _mean_tokens(prompts, answers)
    held_out_pairs = min(recipe.held_out_pairs, parts[HELD_OUT].num_rows)
    judged = _mean_tokens(*_lengths(parts[HELD_OUT], replace(recipe, method=DPO)))
    return Work(
        steps=steps,
        pairs=pairs,
        tokens=round(each * pairs),
        longest_rows=longest,
        held_out_pairs=held_out_pairs,
        held_out_tokens=round(judged * held_out_pairs),
        validation_tokens=round(each * _validated(recipe, rows, steps, max_steps)),
    )


def whole(works: Sequence[Work]) -> Work:
    """The work of all stages together; the evaluation comes once, at the end."""
    last = works[-1]
    return replace(
        last,
        steps=sum(one.steps for one in works),
        pairs=sum(one.pairs for one in works),
        tokens=sum(one.tokens for one in works),
        longest_rows=max(one.longest_rows for one in works),
        validation_tokens=sum(one.validation_tokens for one in works),
    )


def _validated(recipe: Recipe, rows: int, steps: int, max_steps: int | None) -> int:
    """How often a pair is read that is kept aside, the reference's first look included; only DPO looks at any."""
    every = steps_between(recipe, rows, max_steps) if recipe.method == DPO else None
    return 0 if every is None else min(MAX_PAIRS, int(MAX_SHARE * rows)) * (steps // every + 1)


def _mean_tokens(prompts: Sequence[int], answers: Sequence[tuple[int, ...]]) -> float:
    return (sum(prompts) + sum(sum(row) for row in answers)) / max(1, len(prompts))


def _lengths(table: Any, recipe: Recipe) -> tuple[list[int], list[tuple[int, ...]]]:
    """Of each row: tokens of the prompt, and of each answer that is read, cut as the training cuts them."""
    max_length, read = recipe.max_length, ("chosen",) if recipe.method == SFT else ANSWERS
    prompts = [
        min(max_length, round(number / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS)
        for number in _characters(table["prompt"])
    ]
    columns = [_characters(table[name]) for name in read if name in table.column_names]
    answers = [
        tuple(min(max_length - prompt, round(number / CHARACTERS_PER_TOKEN) + 1) for number in row)
        for prompt, *row in zip(prompts, *columns, strict=True)
    ]
    return prompts, answers


def _characters(column: Any) -> list[int]:
    """Of each row, whose value is a text or a list of messages."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_list(column.type):
        return [number or 0 for number in pc.utf8_length(column).to_pylist()]
    each = pc.utf8_length(pc.struct_field(pc.list_flatten(column), "content")).to_pylist()
    found = [0] * len(column)
    for row, number in zip(pc.list_parent_indices(column).to_pylist(), each, strict=True):
        found[row] += number
    return found


def past_of(run: Run, kind: str) -> Past | None:
    """What an earlier run of this kind took; None where it does not say, or did not train from its first step on."""
    said, training = run.config.preflight, run.training
    if not said or said["kind"] != kind or not said["estimate"] or not training or "measured" not in training:
        return None
    measured, counted = training["measured"], said["estimate"]["counted"]
    if sum(line["time"] >= measured["training_began"] for line in run.metrics()) < training["steps"]:
        return None  # it went on from a checkpoint
    finished_at = run.record.get("finished_at")
    evaluation_s = counted["evaluation_s"]
    if run.is_finished and finished_at:
        evaluation_s = max(1.0, datetime.fromisoformat(finished_at).timestamp() - measured["ended"])
    return Past(
        run_id=run.run_id,
        fixed_bytes=counted["fixed_bytes"],
        activation_bytes=counted["activation_bytes"],
        training_s=counted["training_s"],
        evaluation_s=counted["evaluation_s"],
        took_bytes=measured["peak_device_memory_bytes"] or measured["peak_memory_bytes"],
        took_loading_s=measured["loading_s"],
        took_training_s=measured["training_s"],
        took_evaluation_s=evaluation_s,
    )


def minutes(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _setting(plan: Plan, recipe: Recipe, cores: int) -> Setting:
    """Of one stage, whose recipe this is."""
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and plan.device == "gpu")
    return Setting(
        method=recipe.method,
        tuning=recipe.tuning,
        device=plan.device,
        value_bytes=2 if bf16 else 4,
        lora_rank=recipe.lora_rank,
        micro_batch=gcd(recipe.micro_batch_size, recipe.per_process_batch(plan.num_processes)),
        tokens_per_batch=_tokens_per_batch(recipe, plan.device),
        num_processes=plan.num_processes,
        cores=cores,
        keeps_activations=plan.device == "cpu",
    )


def _tokens_per_batch(recipe: Recipe, device: str) -> int | None:
    """Of the fast step, None where it is not taken."""
    if not recipe.takes_fast_step:
        return None
    return recipe.tokens_per_batch or TOKENS[device]


def _judged(
    estimate: Estimate, room: Room | None, asked: Policy, chosen: Policy, *, is_serving: bool
) -> tuple[str | None, str | None]:
    """The warning and the refusal, as sentences; at most one of them."""
    if room is None:
        return "The free memory of the GPU cannot be read (is nvidia-smi there?), so nothing was checked.", None
    limit = room.total_bytes if chosen is Policy.PAUSE else room.free_bytes
    there = f"there are {_gb(limit)}" if chosen is Policy.PAUSE else f"{_gb(limit)} of {_gb(room.total_bytes)} are free"
    needed = f"about {_gb(estimate.memory_bytes)} of {room.what} (at least {_gb(estimate.memory_low_bytes)})"
    change = "Use a recipe with a smaller micro_batch_size or max_length, fewer processes, or a smaller model"
    free_some = "" if chosen is Policy.PAUSE else ", or free some memory"
    if estimate.memory_low_bytes > limit:
        pausing = is_serving and chosen is Policy.SHARE and estimate.memory_low_bytes <= room.total_bytes
        pause = "; or let the chat pause meanwhile with ZLOOP_DEVICE_POLICY=pause" if pausing else ""
        return None, f"This run needs {needed}, and {there}. {change}{free_some}{pause}."
    if asked is Policy.REFUSE and is_serving and estimate.memory_high_bytes > limit:
        return None, (
            f"This run may need up to {_gb(estimate.memory_high_bytes)} of {room.what} beside the served model, and "
            f"{there}; ZLOOP_DEVICE_POLICY=refuse. {change}, or set share or pause."
        )
    if estimate.memory_high_bytes > limit:
        return f"This is near the limit: it may need up to {_gb(estimate.memory_high_bytes)}, and {there}.", None
    return None, None


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
