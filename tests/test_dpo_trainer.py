"""The fast step is TRL's: the same log-probabilities, losses, gradients and metrics from the same pairs and weights."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from feedback_store.records import Preference
from trainer.recipe import Recipe, load_recipe
from trainer.reference_cache import ReferenceCache, pair_key
from trainer.tokens import as_read, tokenise

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MAX_LENGTH = 96
RECIPE = replace(load_recipe("dpo-lora"), max_length=MAX_LENGTH, batch_size=6, lora_rank=4)
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def preferences() -> list[Preference]:
    """Six pairs of very different lengths; two are cut at `MAX_LENGTH`, one answer is a word."""
    made = tiny_model.made_up_preferences(6)
    made[1] = replace(made[1], chosen="red " * 60)
    made[2] = replace(made[2], rejected="seven eight nine " * 40, chosen="one")
    made[3] = replace(made[3], prompt=({"role": "user", "content": "blue green " * 10},))
    return made


def arguments(out: Path, **others: Any) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=6,
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        **{"beta": 0.3, **others},
    )


def common() -> dict[str, Any]:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    return {
        "model": str(tiny_model.shared_directory()),
        "processing_class": AutoTokenizer.from_pretrained(tiny_model.shared_directory()),
        "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def moved(trainer: Any) -> Any:
    """The trainer with an adapter that says something, the same each time; without one, with other weights."""
    import torch

    dice = torch.Generator().manual_seed(3)
    learning = sorted((name, one) for name, one in trainer.model.named_parameters() if one.requires_grad)
    for name, parameter in learning:
        noise = torch.randn(parameter.shape, generator=dice)
        parameter.data = noise * 0.15 if "lora_" in name else parameter.data + noise * 0.02
    return trainer


def trl(out: Path, rows: Sequence[Preference], *, full: bool = False, **others: Any) -> Any:
    """TRL's own trainer on the text."""
    from datasets import Dataset
    from trl import DPOTrainer

    parts = common() | ({"peft_config": None} if full else {})
    read = [as_read(parts["processing_class"], preference) for preference in rows]
    texts = [
        {
            "prompt": list(one.prompt),
            "chosen": [{"role": "assistant", "content": one.chosen}],
            "rejected": [{"role": "assistant", "content": one.rejected}],
        }
        for one in read
    ]
    return moved(DPOTrainer(args=arguments(out, **others), train_dataset=Dataset.from_list(texts), **parts))


def ours(out: Path, rows: Sequence[Preference], budget: int = 256, *, full: bool = False, **others: Any) -> Any:
    """Ours on the same pairs, references added."""
    from trainer.dpo_trainer import PairTrainer

    parts = common() | ({"peft_config": None} if full else {})
    tokens = [(tokenise(parts["processing_class"], row, MAX_LENGTH), row.weight) for row in rows]
    trainer = PairTrainer(args=arguments(out, **others), rows=tokens, tokens_per_batch=budget, **parts)
    trainer.add_references(ReferenceCache(out / "references", "x"), lambda _done, _all: None)
    return moved(trainer)


def step(trainer: Any) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Loss, metrics and gradients of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # as in the first round of `train`
    loss = float(trainer.training_step(trainer.model, batch))
    gradients = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return loss, metrics, gradients


def check_gradients(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4, name


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_trls(tmp_path: Path, loss: str) -> None:
    wanted, _, wanted_gradients = step(trl(tmp_path / "trl", preferences(), **LOSSES[loss]))
    found, _, gradients = step(ours(tmp_path / "ours", preferences(), **LOSSES[loss]))
    assert found == pytest.approx(wanted, rel=1e-5)
    check_gradients(gradients, wanted_gradients)
    assert len(gradients) == 14 * tiny_model.LAYERS


def test_all_weights_can_learn_the_lm_head_too(tmp_path: Path) -> None:
    wanted, _, wanted_gradients = step(trl(tmp_path / "trl", preferences(), full=True))
    trainer = ours(tmp_path / "ours", preferences(), full=True)
    assert trainer.ref_model is None  # no second model: the references were computed before anything moved
    found, _, gradients = step(trainer)
    assert found == pytest.approx(wanted, rel=1e-5)
    check_gradients(gradients, wanted_gradients)


def test_a_short_last_step_is_filled_up_by_pairs_that_count_nowhere(tmp_path: Path) -> None:
    from trainer.dpo_trainer import in_steps
    from trainer.pair_rows import collate

    trainer = ours(tmp_path, preferences()[:5])
    rows = [(tokenise(trainer.processing_class, row, MAX_LENGTH), 1.0) for row in preferences()[:5]]
    filled = in_steps(rows, 4, 2)
    assert [row["weight"] for row in filled] == [1.0] * 5 + [0.0] * 3
    assert len(in_steps(rows, 4, 1)) == 5
    alone = float(trainer.training_step(trainer.model, collate(filled[4:5])))
    metrics = dict(trainer._metrics["train"])
    trainer._metrics["train"].clear()
    assert float(trainer.training_step(trainer.model, collate(filled[4:]))) == pytest.approx(alone, rel=1e-6)
    for name in metrics.keys() - {"num_tokens"}:
        assert trainer._metrics["train"][name] == pytest.approx(metrics[name], rel=1e-5), name


def test_metrics_are_trls_however_the_pairs_are_packed(tmp_path: Path) -> None:
    loss, wanted, wanted_gradients = step(trl(tmp_path / "trl", preferences()))
    for budget in (1, 200, 4096):
        found_loss, found, gradients = step(ours(tmp_path / "ours", preferences(), budget))
        assert found_loss == pytest.approx(loss, rel=1e-5)
        check_gradients(gradients, wanted_gradients)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert found["weights"] == 1.0
        assert found["lengths/rejected"] > found["lengths/chosen"] > 0


def test_summed_log_probabilities_are_those_of_plain_forward_passes(tmp_path: Path) -> None:
    import torch

    from trainer.pair_rows import tokens_of

    trainer = ours(tmp_path, preferences())
    pairs = [tokens_of(row) for row in trainer.train_dataset]
    assert max(len(pair.prompt) + len(pair.chosen) for pair in pairs) == MAX_LENGTH
    for pair, found in zip(pairs, trainer.logps(pairs), strict=True):
        with torch.no_grad():
            plain = [trainer._plain_logp(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        assert [found.chosen, found.rejected] == pytest.approx(plain, abs=1e-4)


def test_flex_attention_hides_the_same(tmp_path: Path) -> None:
    from torch.nn.attention.flex_attention import create_mask

    from trainer.pair_rows import collate, columns, row_of, tokens_of

    trainer = ours(tmp_path, preferences())
    row = row_of(collate([columns(tokens_of(one)) for one in trainer.train_dataset]), [4, 1, 0])
    mask = create_mask(row.sees(), None, None, row.layout.tokens, row.layout.tokens, device="cpu")
    assert mask[0, 0].equal(row.layout.visible())


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_pair_counts_by_its_weight(tmp_path: Path, kind: str) -> None:
    weights = (1.0, 0.25, 2.0, 1.0, 0.5, 1.0)
    rows = [replace(row, weight=weight) for row, weight in zip(preferences(), weights, strict=True)]
    alone = [step(trl(tmp_path / "trl", [row]))[0] for row in rows]
    wanted = sum(weight * loss for weight, loss in zip(weights, alone, strict=True)) / len(rows)
    if kind == "ours":
        found, metrics, _ = step(ours(tmp_path / "ours", rows))
        assert metrics["weights"] == pytest.approx(sum(weights) / 6)
    else:
        trainer = stock(tmp_path / "stock", rows)
        batches = list(trainer.get_train_dataloader())
        assert len(batches) == trainer.args.gradient_accumulation_steps == 6
        found = sum(float(trainer.compute_loss(trainer.model, batch)) for batch in batches) / 6
    assert found == pytest.approx(wanted, rel=1e-5)


def stock(out: Path, rows: Sequence[Preference]) -> Any:
    from trainer.dpo_trainer import StockTrainer

    parts = common()
    tokens = [(tokenise(parts["processing_class"], row, MAX_LENGTH), row.weight) for row in rows]
    return moved(StockTrainer(args=arguments(out), rows=tokens, why="a test", **parts))


def test_weights_of_one_leave_trls_path_as_it_is(tmp_path: Path) -> None:
    wanted, metrics, gradients = step(trl(tmp_path / "trl", preferences()))
    trainer = stock(tmp_path / "stock", preferences())
    found, found_metrics, found_gradients = step(trainer)
    assert (found, found_metrics) == (wanted, metrics)
    check_gradients(found_gradients, gradients)
    assert trainer.facts == {"fast_step": False, "fast_step_off_because": "a test"}


# The reference


def made(recipe: Recipe, rows: Sequence[Preference], out: Path) -> Any:
    from trainer.methods.dpo import make_trainer

    return make_trainer(
        recipe,
        rows,
        base_dir=tiny_model.shared_directory(),
        tokenizer=common()["processing_class"],
        arguments=arguments(out),
        references=out / "references",
        report=lambda _done, _all: None,
    )


def test_a_reference_is_computed_once_for_each_pair_ever(tmp_path: Path) -> None:
    rows = preferences()
    first = made(RECIPE, rows[:4], tmp_path)
    assert first.facts["references"] == {"cached": 0, "computed": 4}
    more = made(RECIPE, [*reversed(rows), rows[0]], tmp_path)
    assert more.facts["references"] == {"cached": 4, "computed": 2}
    again = made(replace(RECIPE, beta=0.5, learning_rate=1e-5), rows, tmp_path)
    assert again.facts["references"] == {"cached": 6, "computed": 0}
    first_of = {tuple(row["chosen_ids"]): row["ref_chosen_logps"] for row in first.train_dataset}
    for row in again.train_dataset.select(range(4)):
        assert first_of[tuple(row["chosen_ids"])] == row["ref_chosen_logps"]
    cut = made(replace(RECIPE, max_length=64), rows, tmp_path)
    assert cut.facts["references"]["computed"] > 0  # other tokens, another pair


def test_a_pairs_reference_does_not_hang_on_what_else_was_missing(tmp_path: Path) -> None:
    rows = preferences()
    all_at_once = made(RECIPE, rows, tmp_path / "one").train_dataset
    for number in range(0, 6, 3):
        made(RECIPE, rows[number : number + 2], tmp_path / "other")
    piece_by_piece = made(RECIPE, rows, tmp_path / "other").train_dataset
    assert all_at_once["ref_chosen_logps"] == piece_by_piece["ref_chosen_logps"]
    assert all_at_once["ref_rejected_logps"] == piece_by_piece["ref_rejected_logps"]


def test_the_first_loss_is_ln_2(tmp_path: Path) -> None:
    loss, metrics, _ = step(made(RECIPE, preferences(), tmp_path))
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)


# Where the fast step is off


def test_the_recipe_can_switch_it_off(tmp_path: Path) -> None:
    trainer = made(replace(RECIPE, fast_step="off"), preferences(), tmp_path)
    assert trainer.facts == {"fast_step": False, "fast_step_off_because": "the recipe says so"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 64}, "attention slides over 64 tokens, max_length is 96"),
        ({"sliding_window": 96}, None),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of the kind linear_attention"),
        ({"output_router_logits": True}, "router losses are on"),
        ({"is_encoder_decoder": True}, "the model has an encoder"),
    ],
)
def test_models_it_cannot_take_are_named(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    from transformers import AutoConfig

    from trainer.dpo_trainer import why_stock

    config = AutoConfig.from_pretrained(tiny_model.shared_directory())
    for name, value in changes.items():
        setattr(config, name, value)
    assert why_stock(config, arguments(tmp_path)) == reason


def test_a_model_that_does_not_attend_as_told_is_found_out(tmp_path: Path) -> None:
    from trainer import pair_attention

    trainer = ours(tmp_path, preferences())
    assert trainer.difference() is None
    with pytest.MonkeyPatch.context() as patch:
        # A row whose answers see each other, as in a model that makes a mask of its own.
        patch.setattr(pair_attention, "_by_pair", lambda q, k, v, _row, scale: plain_causal(q, k, v, scale))
        assert "off the plain ones" in trainer.difference()


def plain_causal(query: Any, key: Any, value: Any, scale: float) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return found.transpose(1, 2)


def test_a_head_that_is_more_than_a_matrix_is_found_out(tmp_path: Path) -> None:
    trainer = ours(tmp_path, preferences())
    trainer.model.config.logit_scale = 0.5
    assert trainer.difference() == "the logits go through logit_scale"


def test_pair_keys_know_where_the_answer_begins() -> None:
    from trainer.tokens import PairTokens

    pairs = [PairTokens([1, 2], [3], [4]), PairTokens([1], [2, 3], [4]), PairTokens([1, 2], [3, 4], [])]
    assert len({pair_key(pair) for pair in [*pairs, PairTokens([12], [3], [4])]}) == 4
