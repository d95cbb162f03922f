"""The count behind an estimate, and what it learns from earlier runs."""

from dataclasses import replace

import pytest

from trainer.estimate import HIGHEST, Past, Setting, Shape, Work, estimate_run

SMALL = Shape.of(layers=30, hidden=576, feed_forward=1536, key_value=192, vocabulary=49152, tied=True)
SEVEN = Shape.of(layers=32, hidden=4096, feed_forward=14336, key_value=1024, vocabulary=32000, tied=False)
WORK = Work(steps=10, pairs=80, tokens=40_000, longest_rows=800, held_out_pairs=40, held_out_tokens=20_000)
ON_CPU = Setting(
    method="dpo", tuning="lora", device="cpu", value_bytes=4, lora_rank=16, micro_batch=1, tokens_per_batch=None,
    num_processes=1, cores=2, keeps_activations=True,
)  # fmt: skip
ON_GPU = replace(ON_CPU, device="gpu", value_bytes=2, keeps_activations=False)


def past(took: float, *, run_id: str = "run_1", loading_s: float = 20.0) -> Past:
    """A run that took `took` times what the constants said."""
    counted = estimate_run(SMALL, WORK, ON_CPU).counted
    return Past(
        run_id=run_id,
        fixed_bytes=int(counted["fixed_bytes"]),
        activation_bytes=int(counted["activation_bytes"]),
        training_s=counted["training_s"],
        evaluation_s=counted["evaluation_s"],
        took_bytes=int(counted["fixed_bytes"] + took * counted["activation_bytes"]),
        took_loading_s=loading_s,
        took_training_s=took * counted["training_s"],
        took_evaluation_s=took * counted["evaluation_s"],
    )


def test_parameters_are_counted_as_the_models_have_them() -> None:
    assert SMALL.parameters == 134_515_008  # SmolLM2-135M
    assert SEVEN.parameters == 7_241_732_096  # Mistral-7B, and Zephyr-7B
    assert SMALL.lora_parameters(16) == 4_884_480  # as PEFT prints for all linear layers


def test_weights_of_seven_billion_take_what_is_known_of_them() -> None:
    assert estimate_run(SEVEN, WORK, ON_GPU).counted["fixed_bytes"] == pytest.approx(14.5e9 + 1.6e9, rel=0.1)
    four_bits = replace(ON_GPU, tuning="qlora")
    assert estimate_run(SEVEN, WORK, four_bits).counted["fixed_bytes"] == pytest.approx(4.4e9 + 1.6e9, rel=0.1)
    full = estimate_run(SEVEN, WORK, replace(ON_GPU, tuning="full")).counted["fixed_bytes"]
    assert full > 16 * SEVEN.parameters


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"micro_batch": 2}, "memory_bytes"),
        ({"num_processes": 2}, "memory_bytes"),
        ({"lora_rank": 256}, "memory_bytes"),
        ({"tokens_per_batch": 4000}, "memory_bytes"),
        ({"tuning": "full"}, "memory_bytes"),
    ],
)
def test_what_makes_a_run_larger_makes_its_estimate_larger(more: dict[str, int], what: str) -> None:
    less = estimate_run(SMALL, WORK, ON_CPU)
    assert getattr(estimate_run(SMALL, WORK, replace(ON_CPU, **more)), what) > getattr(less, what)


def test_more_work_takes_longer_and_more_cores_less() -> None:
    one = estimate_run(SMALL, WORK, ON_CPU)
    assert estimate_run(SMALL, replace(WORK, tokens=80_000), ON_CPU).training_s == pytest.approx(2 * one.training_s)
    assert estimate_run(SMALL, WORK, replace(ON_CPU, cores=8)).training_s == pytest.approx(one.training_s / 4, rel=0.01)
    assert one.total_s == one.loading_s + one.training_s + one.evaluation_s


def test_without_a_run_the_constants_say_so_and_the_span_is_wide() -> None:
    estimate = estimate_run(SMALL, WORK, ON_CPU)
    assert estimate.learned_from == ()
    assert "constants measured on two cores" in estimate.basis
    assert "not on any GPU" in estimate_run(SMALL, WORK, ON_GPU).basis
    assert estimate.memory_low_bytes < estimate.memory_bytes < estimate.memory_high_bytes


@pytest.mark.parametrize("took", [0.3, 1.0, 4.0])
def test_after_one_run_the_same_run_is_expected_as_it_was(took: float) -> None:
    run = past(took)
    estimate = estimate_run(SMALL, WORK, ON_CPU, [run])
    assert estimate.memory_bytes == pytest.approx(run.took_bytes, rel=0.01)
    assert estimate.training_s == pytest.approx(run.took_training_s, rel=0.01)
    assert estimate.evaluation_s == pytest.approx(run.took_evaluation_s, rel=0.01)
    assert estimate.loading_s == 20
    assert estimate.learned_from == ("run_1",)
    assert "the last run of this kind" in estimate.basis


def test_the_newest_run_weighs_most_and_old_ones_are_forgotten() -> None:
    slow = [past(4.0, run_id=f"run_{number}") for number in range(20)]
    plain = estimate_run(SMALL, WORK, ON_CPU).training_s
    assert estimate_run(SMALL, WORK, ON_CPU, slow).training_s == pytest.approx(4 * plain, rel=0.01)
    one_fast = estimate_run(SMALL, WORK, ON_CPU, [past(1.0), *slow])
    assert 1.5 * plain < one_fast.training_s < 2.5 * plain
    three_fast = estimate_run(SMALL, WORK, ON_CPU, [past(1.0)] * 3 + slow)
    assert three_fast.training_s < 1.3 * plain
    assert len(three_fast.learned_from) == 5


def test_a_run_that_took_less_than_its_weights_is_no_nonsense() -> None:
    tiny = replace(past(1.0), took_bytes=1, took_training_s=0.0)
    estimate = estimate_run(SMALL, WORK, ON_CPU, [tiny])
    assert estimate.memory_bytes > estimate.counted["fixed_bytes"]
    assert estimate.training_s > 0
    assert estimate_run(SMALL, WORK, ON_CPU, [past(1e6)]).training_s <= HIGHEST * estimate.counted["training_s"] + 1


def test_the_fast_step_reads_less_and_scores_the_reference_before_the_first() -> None:
    stock, fast = (estimate_run(SMALL, WORK, replace(ON_CPU, tokens_per_batch=tokens)) for tokens in (None, 1024))
    assert fast.training_s == pytest.approx(0.4 * stock.training_s, rel=0.01)
    assert fast.loading_s - stock.loading_s == pytest.approx(fast.training_s / 2, abs=0.1)
