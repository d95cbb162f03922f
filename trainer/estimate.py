"""What a run will take: memory and time, from the model's shape, the recipe and the work. Pure; imports no torch.

    estimate = estimate_run(Shape(…), work, setting, past)

Memory is counted: what a process takes without a model, the weights, what is trained with its gradients and Adam's two
moments, and the activations of the largest micro batch with its logits, kept for the backward pass. What a count cannot
know (allocators, fused kernels, what a faster step leaves out) is learned from earlier runs on this machine: `past`,
newest first, of the same method, base and device. Without any, constants measured on two cores stand in, said so in
`basis`. Not measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 2**20
PROCESS_BYTES = {"cpu": 560 * MIB, "gpu": 900 * MIB}  # Python with torch and TRL; on a GPU its context
LAUNCHER_BYTES = 240 * MIB  # accelerate's own process, which imports torch too
ADAM_BYTES = 16  # a trained weight in fp32: itself, its gradient, two moments
QUANTISED_BYTES = 0.6  # a weight in 4 bits with its scales
# × parameters, of training: forward and backward through frozen weights; by TRL's own step prompts are read twice, and
# the reference goes forward in each step. By the fast step it does so once, before the first. SFT has no reference, but
# its rows are not packed: 16 short ones, one at a time, took what 9 a token say on two cores.
FLOP_PER_TOKEN = {"fast": 4, "stock": 10, "sft": 9}
WEIGHTS_FLOP_PER_TOKEN = 2  # more, where every weight has a gradient
VALIDATION_FLOP_PER_TOKEN = 2
REFERENCE_FLOP_PER_TOKEN = 2
TRAIN_FLOPS = {"cpu": 41e9, "gpu": 100e12}  # a second and core, a second and GPU
EVALUATION_FLOP_PER_TOKEN = 4  # two versions forward
LOADING_S = {"cpu": 14.0, "gpu": 60.0}
CANARIES_S = {"cpu": 12.0, "gpu": 10.0}  # the beginnings of answers an evaluation records
LEARNED_FROM = 5
HALVES = 0.5  # each older run counts half as much as the next newer one
SPREAD = {"constants": (0.4, 1.8), "runs": (0.8, 1.25)}  # how far the activations may be off
LOWEST, HIGHEST = 1e-3, 1e4  # a correction learned from runs never goes beyond


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of the Llama family: sizes, and the number of its parameters."""

    parameters: int
    layers: int
    hidden: int
    feed_forward: int
    key_value: int  # width of the keys, and of the values
    vocabulary: int

    @classmethod
    def of(
        cls, *, layers: int, hidden: int, feed_forward: int, key_value: int, vocabulary: int, tied: bool
    ) -> Shape:  # fmt: skip
        """Count the parameters; `tied`: the head is the embedding."""
        layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * feed_forward + 2 * hidden
        parameters = layers * layer + vocabulary * hidden * (1 if tied else 2) + hidden
        return cls(parameters, layers, hidden, feed_forward, key_value, vocabulary)

    def lora_parameters(self, rank: int) -> int:
        """Those of an adapter on all linear layers."""
        square, narrow, wide = 2 * self.hidden, self.hidden + self.key_value, self.hidden + self.feed_forward
        return rank * self.layers * (2 * square + 2 * narrow + 3 * wide)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be gone through, in tokens: of all pairs of training and evaluation, and of the longest pair.

    Tokens of a pair: prompt, chosen and rejected, each once. `longest_rows`: prompt + chosen and prompt + rejected.
    Of one stage, or the sums of all. `validation_tokens`: of the rows kept aside, each time they are read.
    """

    steps: int
    pairs: int
    tokens: int
    longest_rows: int
    held_out_pairs: int
    held_out_tokens: int
    validation_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """How it is gone through. device: cpu or gpu; value_bytes: 4 in fp32, 2 in bf16; tuning: lora, qlora or full."""

    method: str
    tuning: str
    device: str
    value_bytes: int
    lora_rank: int
    micro_batch: int  # pairs in memory at once, per process
    tokens_per_batch: int | None  # where rows are packed: the most tokens of a micro batch
    num_processes: int
    cores: int
    keeps_activations: bool  # False: computed again in the backward pass

    @property
    def is_fast(self) -> bool:
        """Whether `dpo_trainer.py` takes its own step, which packs rows."""
        return self.tokens_per_batch is not None


@dataclass(frozen=True, slots=True)
class Past:
    """What an earlier run was estimated to take by the constants alone, and what it took."""

    run_id: str
    fixed_bytes: int
    activation_bytes: int
    training_s: float
    evaluation_s: float
    took_bytes: int
    took_loading_s: float
    took_training_s: float
    took_evaluation_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory (all processes; on a GPU, of one) and seconds, with the span that memory may lie in.

    `counted`: what the constants alone say, for later runs to learn from. `basis`: a sentence on where it is from.
    """

    memory_bytes: int
    memory_low_bytes: int
    memory_high_bytes: int
    loading_s: float
    training_s: float
    evaluation_s: float
    learned_from: tuple[str, ...]
    basis: str
    counted: dict[str, float]

    @property
    def total_s(self) -> float:
        return self.loading_s + self.training_s + self.evaluation_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "total_s": round(self.total_s, 1)}


def estimate_run(
    shape: Shape,
    work: Work,
    setting: Setting,
    past: Sequence[Past] = (),
    *,
    before: Sequence[tuple[Work, Setting]] = (),
) -> Estimate:
    """`past`: runs of the same method, tuning, base and device on this machine, newest first.

    `before`: the stages that come before the last one, which `work` and `setting` are of. Their times add up, and the
    largest of their memories counts.
    """
    newest, stages = past[:LEARNED_FROM], [*before, (work, setting)]
    fixed = max(fixed_bytes(shape, how) for _, how in stages)
    activations = max(activation_bytes(shape, what, how) for what, how in stages)
    training_s = sum(training_seconds(shape, what, how) for what, how in stages)
    evaluation_s = evaluation_seconds(shape, work, setting)
    memory = _learned([(one.took_bytes - one.fixed_bytes, one.activation_bytes) for one in newest])
    pace = _learned([(one.took_training_s, one.training_s) for one in newest])
    judging = _learned([(one.took_evaluation_s, one.evaluation_s) for one in newest])
    loading_s = sum(loading_seconds(shape, what, how) for what, how in stages)
    loading_s = _mean([one.took_loading_s for one in newest]) if newest else loading_s
    low, high = SPREAD["runs" if newest else "constants"]
    return Estimate(
        memory_bytes=round(fixed + memory * activations),
        memory_low_bytes=round(fixed + low * memory * activations),
        memory_high_bytes=round(fixed + high * memory * activations),
        loading_s=round(loading_s, 1),
        training_s=round(pace * training_s, 3),
        evaluation_s=round(judging * evaluation_s, 3),
        learned_from=tuple(one.run_id for one in newest),
        basis=_basis(newest, setting),
        counted={
            "fixed_bytes": fixed, "activation_bytes": activations, "training_s": training_s,
            "evaluation_s": evaluation_s,
        },
    )  # fmt: skip


def fixed_bytes(shape: Shape, setting: Setting) -> int:
    """What a run takes whatever it reads: processes, weights, what is trained."""
    weight_bytes = QUANTISED_BYTES if setting.tuning == "qlora" else setting.value_bytes
    trained = shape.parameters if setting.tuning == "full" else shape.lora_parameters(setting.lora_rank)
    state = trained * ADAM_BYTES - (trained * setting.value_bytes if setting.tuning == "full" else 0)
    # Without an adapter to switch off, TRL's own step loads the reference as a second model.
    second = setting.tuning == "full" and not setting.is_fast and setting.method != "sft"
    models = shape.parameters * weight_bytes * (2 if second else 1)
    each = PROCESS_BYTES[setting.device] + models + state
    if setting.device == "gpu":
        return round(each)
    return round(each * setting.num_processes + LAUNCHER_BYTES)


def activation_bytes(shape: Shape, work: Work, setting: Setting) -> int:
    """Activations of the largest micro batch, with the logits of its tokens and their gradient."""
    tokens = work.longest_rows * setting.micro_batch
    if setting.tokens_per_batch is not None:
        tokens = max(work.longest_rows, setting.tokens_per_batch)
    kept = 12 * shape.hidden + 5 * shape.feed_forward
    per_layer = kept if setting.keeps_activations else shape.hidden
    layers = shape.layers * per_layer + (0 if setting.keeps_activations else kept)
    logits = 3 * 4 * shape.vocabulary  # fp32: the logits, their softmax, the gradient
    each = tokens * (layers * setting.value_bytes + logits)
    return round(each if setting.device == "gpu" else each * setting.num_processes)


def loading_seconds(shape: Shape, work: Work, setting: Setting) -> float:
    """By the constants: to the first step, the reference of every pair included where that comes before it."""
    flop = work.tokens * shape.parameters * REFERENCE_FLOP_PER_TOKEN if setting.is_fast else 0
    return LOADING_S[setting.device] + flop / _flops(setting, setting.num_processes)


def training_seconds(shape: Shape, work: Work, setting: Setting) -> float:
    """By the constants, without loading."""
    each = FLOP_PER_TOKEN["fast" if setting.is_fast else "sft" if setting.method == "sft" else "stock"]
    each += WEIGHTS_FLOP_PER_TOKEN if setting.tuning == "full" else 0
    flop = shape.parameters * (work.tokens * each + work.validation_tokens * VALIDATION_FLOP_PER_TOKEN)
    return flop / _flops(setting, setting.num_processes)


def evaluation_seconds(shape: Shape, work: Work, setting: Setting) -> float:
    """By the constants, loading included."""
    flop = work.held_out_tokens * shape.parameters * EVALUATION_FLOP_PER_TOKEN
    return LOADING_S[setting.device] + CANARIES_S[setting.device] + flop / _flops(setting, 1)


def _flops(setting: Setting, processes: int) -> float:
    """A second, with all that a run may use: on a CPU every core."""
    if setting.device == "gpu":
        return TRAIN_FLOPS["gpu"] * processes
    return TRAIN_FLOPS["cpu"] * setting.cores


def _learned(took_and_counted: Sequence[tuple[float, float]]) -> float:
    """How far off the count is: the geometric mean of the ratios, the newest weighing most; 1 without any."""
    ratios = [took / counted for took, counted in took_and_counted if counted > 0]
    logs = [math.log(min(HIGHEST, max(LOWEST, ratio))) for ratio in ratios]
    return math.exp(_mean(logs)) if logs else 1.0


def _mean(values: Sequence[float]) -> float:
    weights = [HALVES**age for age in range(len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _basis(past: Sequence[Past], setting: Setting) -> str:
    if past:
        runs = "the last run" if len(past) == 1 else f"the last {len(past)} runs"
        return f"Learned from {runs} of this kind on this machine, the newest ({past[0].run_id}) weighing most."
    where = "two cores" if setting.device == "cpu" else "data sheets, not on any GPU"
    return f"No run of this kind has finished on this machine yet: constants measured on {where} stand in."
