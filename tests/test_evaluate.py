"""Candidate against champion: the numbers are those of two plain forward passes, and the statistics are exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from feedback_store.snapshots import freeze
from trainer import generation
from trainer.cycle import comparison
from trainer.evaluate import TIE_NATS, count, evaluate, pick_pairs
from trainer.recipe import load_recipe
from trainer.tokens import tokenise

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_TOKENS", 4)


def results(*differences: float) -> list[dict[str, Any]]:
    return [{"preference_id": f"pref_{i}", "difference": difference} for i, difference in enumerate(differences)]


def test_wins_ties_and_losses_with_an_exact_test() -> None:
    counted = count(results(*[1.0] * 22, *[0.0] * 6, *[-2.0] * 12), beta=0.1)
    assert (counted["wins"], counted["ties"], counted["losses"], counted["pairs"]) == (22, 6, 12, 40)
    assert counted["p_value"] == pytest.approx(0.1214, abs=1e-4)
    assert counted["interval"] == pytest.approx([0.4640, 0.8008], abs=2e-3)
    assert counted["win_rate"] == pytest.approx(22 / 34)
    assert counted["mean_margin"] == pytest.approx(0.1 * (22 - 24) / 40)


def test_a_difference_within_the_tolerance_is_a_tie() -> None:
    counted = count(results(TIE_NATS, -TIE_NATS, TIE_NATS * 1.01), beta=0.1)
    assert (counted["wins"], counted["ties"], counted["losses"]) == (1, 2, 0)


def test_no_pairs_are_no_evidence() -> None:
    counted = count([], beta=0.1)
    assert (counted["pairs"], counted["p_value"], counted["interval"]) == (0, 1.0, [0.0, 1.0])
    assert counted["win_rate"] is None
    assert counted["mean_margin"] is None


def test_own_picks_come_first_and_the_choice_is_always_the_same() -> None:
    made = tiny_model.made_up_preferences(6)
    made[4] = replace(made[4], source="pick")
    chosen = pick_pairs(made, 3)
    assert [p.preference_id for p in chosen] == ["pref_0004", "pref_0000", "pref_0001"]
    assert pick_pairs(list(reversed(made)), 3) == chosen


def test_scores_equal_two_plain_forward_passes(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_dir = tiny_model.shared_directory()
    adapters = [tiny_model.random_adapter(base_dir, tmp_path / f"adapter{seed}", seed) for seed in (0, 1)]
    snapshot = freeze(tiny_model.made_up_preferences(60), tmp_path / "snapshots", None)
    request = comparison(
        recipe=replace(load_recipe("dpo-lora"), held_out_pairs=3),
        base=tiny_model.shared_tiny().as_dict(),
        models_dir=str(base_dir.parent),
        device="cpu",
        snapshot=snapshot,
        candidate=("v2", adapters[1]),
        champion=("v1", adapters[0]),
    )
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    pairs = {p.preference_id: p for p in tiny_model.made_up_preferences(60)}

    def favour(adapter: Path | None, preference_id: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        tokens = tokenise(tokenizer, pairs[preference_id], 1024)
        total = []
        for answer in (tokens.chosen, tokens.rejected):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([tokens.prompt + answer])).logits[0]
            each = torch.log_softmax(logits, -1)[len(tokens.prompt) - 1 : -1]
            total.append(float(each[range(len(answer)), answer].sum()))
        return total[0] - total[1]

    for champion, adapter in (("v1", adapters[0]), ("v0", None)):
        request["champion"] = {"version": champion, "adapter": str(adapter) if adapter else None}
        found = evaluate(tmp_path, request)
        assert (found["candidate"], found["champion"], found["pairs"]) == ("v2", champion, 3)
        assert [set(one) for one in found["examples"]] == [{"question", "champion", "candidate"}] * 8
        assert any(one["champion"] != one["candidate"] for one in found["examples"])
        for result in found["results"]:
            name = result["preference_id"]
            assert result["difference"] == pytest.approx(favour(adapters[1], name) - favour(adapter, name), abs=1e-3)

    request["candidate"] = {"version": "v0", "adapter": None}
    assert evaluate(tmp_path, request)["ties"] == 3


def test_an_over_long_prompt_is_skipped_and_counted(tmp_path: Path) -> None:
    base_dir = tiny_model.shared_directory()
    snapshot = freeze(tiny_model.made_up_preferences(60), tmp_path / "snapshots", None)
    request = comparison(
        recipe=replace(load_recipe("dpo-lora"), max_length=16),
        base=tiny_model.shared_tiny().as_dict(),
        models_dir=str(base_dir.parent),
        device="cpu",
        snapshot=snapshot,
        candidate=("v1", None),
        champion=("v0", None),
    )
    found = evaluate(tmp_path, request)
    assert found["pairs"] == 0
    assert found["skipped_over_long"] == snapshot.held_out_rows


def plain_loss_on_prose(base_dir: Path) -> float:
    """The mean over tokens of transformers' own loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    nats = tokens = 0.0
    for paragraph in generation.PROSE.read_text().strip().split("\n\n"):
        ids = tokenizer(paragraph, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nats / tokens


def test_what_both_sides_write_and_have_kept_is_told(tmp_path: Path) -> None:
    base_dir = tiny_model.shared_directory()
    adapter = tiny_model.random_adapter(base_dir, tmp_path / "adapter", 1)
    made = [
        replace(one, source="pick" if number % 2 else "trl", rater=f"rater {number % 3}")
        for number, one in enumerate(tiny_model.made_up_preferences(80))
    ]
    snapshot = freeze(made, tmp_path / "snapshots", None)
    request = comparison(
        recipe=replace(load_recipe("dpo-lora"), held_out_pairs=4),
        base=tiny_model.shared_tiny().as_dict(),
        models_dir=str(base_dir.parent),
        device="cpu",
        snapshot=snapshot,
        candidate=("v1", adapter),
        champion=("v0", None),
    )
    found = evaluate(tmp_path, request)
    assert found["held_out"] == snapshot.held_out_rows > 4
    assert sum(one["pairs"] for one in found["sources"].values()) == found["pairs"] == 4
    assert sum(one["pairs"] for one in found["raters"]) == 4
    assert {one["question"] for one in found["examples"]} >= {"What is the capital of France?"}
    assert len(found["examples"]) == found["answers"]["candidate"]["answers"] == 8
    assert any(one["candidate"] != one["champion"] for one in found["examples"])
    assert found["prose"]["champion_nats"] == pytest.approx(plain_loss_on_prose(base_dir), rel=1e-4)
    assert found["prose"]["candidate_nats"] != found["prose"]["champion_nats"]
    one = found["results"][0]
    assert found["held_out_chosen"]["champion_nats"] > 0
    assert one["champion_chosen"] < 0 < one["chosen_tokens"]
    json.dumps(found, allow_nan=False)

    request["candidate"] = {"version": "v0", "adapter": None}
    same = evaluate(tmp_path, request)
    assert all(one["candidate"] == one["champion"] for one in same["examples"])
    assert same["canaries"] == []
    assert same["prose"]["candidate_nats"] == same["prose"]["champion_nats"] == found["prose"]["champion_nats"]
