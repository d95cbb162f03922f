"""Recipes: a method and a tuning each; keys of another one are refused; the team's own beside those that ship."""

from pathlib import Path
from typing import Any

import pytest

from feedback_store.mixing import Mix
from trainer.errors import BadRecipe, TrainingUnavailable, UnknownRecipe
from trainer.recipe import METHODS, TUNINGS, from_mapping, load_recipe, recipe_names
from trainer.tuning import adapter_config, check_tuning, model_init


def test_every_method_and_tuning_has_a_recipe_that_ships() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    assert {recipe.method for recipe in recipes} == set(METHODS)
    assert {recipe.tuning for recipe in recipes} == set(TUNINGS)
    for recipe in recipes:
        assert recipe.about.endswith("."), recipe.name
        assert recipe.name == "practice" or recipe.about.count(".") == 1, recipe.name
        assert from_mapping(recipe.name, recipe.as_dict()) == recipe
        assert recipe.micro_batch(1) >= 1


def test_the_published_values_of_zephyr() -> None:
    full, qlora = load_recipe("zephyr-7b-dpo-full"), load_recipe("zephyr-7b-dpo-qlora")
    for recipe, rate, batch in ((full, 5e-7, 128), (qlora, 5e-6, 16)):
        assert (recipe.beta, recipe.learning_rate, recipe.lr_schedule) == (0.01, rate, "cosine")
        assert (recipe.warmup_ratio, recipe.epochs, recipe.max_length, recipe.batch_size) == (0.1, 1, 1024, batch)
    assert (qlora.lora_rank, qlora.lora_alpha) == (128, 128)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "ppo"}, "method is 'ppo', it must be one of dpo, sft"),
        ({"tuning": "4bit"}, "tuning is '4bit', it must be one of lora, qlora, full"),
        ({"method": "sft", "beta": 0.1}, "beta has no meaning for method sft, only for dpo, sft-then-dpo, kto"),
        ({"tuning": "full", "lora_rank": 8}, "lora_rank has no meaning for tuning full, only for lora, qlora"),
        ({"texts": "/texts"}, "texts has no meaning for method dpo, only for continued-pretraining"),
        ({"method": "continued-pretraining", "texts": "texts"}, "it must be the absolute path of a folder"),
        ({"sft_epochs": 2}, "sft_epochs has no meaning for method dpo, only for sft-then-dpo"),
        ({"method": "kto", "micro_batch_size": 1}, "must be 2 or more, they are 8 and 1"),
        ({"method": "sft-then-dpo", "tuning": "qlora"}, "cannot be tuned with qlora"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        from_mapping("mine", values)


def test_a_resolved_recipe_has_only_what_applies() -> None:
    assert "beta" not in from_mapping("mine", {"method": "sft"}).as_dict()
    assert "lora_rank" not in from_mapping("mine", {"tuning": "full"}).as_dict()
    assert "texts" in from_mapping("mine", {"method": "continued-pretraining"}).as_dict()


def test_stages_mixes_and_steps_follow_the_method() -> None:
    both = from_mapping(
        "mine", {"method": "sft-then-dpo", "sft_learning_rate": 1e-3, "sft_epochs": 3, "learning_rate": 1e-4}
    )
    first, second = both.stages()
    assert (first.method, first.learning_rate, first.epochs) == ("sft", 1e-3, 3)
    assert (second.method, second.learning_rate, second.epochs) == ("dpo", 1e-4, 1)
    assert both.planned_steps(16) == 3 * 2 + 2
    assert both.planned_steps(16, max_steps=2) == 2 + 2
    learns = {method: from_mapping("mine", {"method": method}).mix(0).learns_from for method in METHODS}
    assert learns["kto"] == "ratings"
    assert learns["continued-pretraining"] == "text"
    assert {learns[method] for method in ("dpo", "sft", "sft-then-dpo")} == {Mix().learns_from}


def test_a_micro_batch_of_kto_never_shrinks_to_one() -> None:
    recipe = from_mapping("mine", {"method": "kto", "batch_size": 8})
    assert (recipe.micro_batch(1), recipe.micro_batch(4)) == (2, 2)
    with pytest.raises(BadRecipe, match="8 processes in parts of micro_batch_size 2 leaves 1"):
        recipe.micro_batch(8)


def test_a_recipe_of_the_teams_own(tmp_path: Path) -> None:
    own = tmp_path / "recipes"
    with pytest.raises(UnknownRecipe, match="Your own belong in"):
        load_recipe("gentle", own)
    own.mkdir()
    (own / "gentle.yaml").write_text("learning_rate: 1.0e-5\n")
    assert load_recipe("gentle", own).learning_rate == load_recipe(str(own / "gentle.yaml"), own).learning_rate == 1e-5
    assert "gentle" in recipe_names(own)
    assert "gentle" not in recipe_names()
    with pytest.raises(UnknownRecipe):
        load_recipe(str(tmp_path / "gentle.yaml"), own)
    for content, said in (
        ("- a list", "it holds a list"),
        ("a: [", "cannot be read"),
        ("learnig_rate: 1", "unknown key"),
    ):
        (own / "gentle.yaml").write_text(content)
        with pytest.raises(BadRecipe, match=said):
            load_recipe("gentle", own)
    (own / "dpo-lora.yaml").write_text("")
    with pytest.raises(BadRecipe, match="name of a recipe that ships"):
        load_recipe("dpo-lora", own)


def test_four_bits_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("dpo-qlora")
    with pytest.raises(TrainingUnavailable, match=r"needs a GPU, and there is none here\. Use tuning lora"):
        check_tuning(recipe, "cpu")
    monkeypatch.setattr("trainer.tuning.util.find_spec", lambda _name: None)
    with pytest.raises(TrainingUnavailable, match=r"pip install 'zephyr-loop\[qlora\]'"):
        check_tuning(recipe, "gpu")
    check_tuning(load_recipe("dpo-lora"), "cpu")


def test_how_the_base_is_loaded_and_what_is_put_on_it() -> None:
    assert model_init(load_recipe("dpo-lora"), "cpu") == {"dtype": "float32"}
    assert model_init(load_recipe("dpo-lora"), "gpu") == {"dtype": "bfloat16"}
    assert model_init(load_recipe("zephyr-7b-dpo-full"), "gpu") == {"dtype": "float32"}, "small steps would be lost"
    assert adapter_config(load_recipe("dpo-full")) is None
    four_bits = model_init(load_recipe("dpo-qlora"), "gpu")["quantization_config"]
    assert (four_bits.load_in_4bit, four_bits.bnb_4bit_quant_type) == (True, "nf4")
    adapter = adapter_config(load_recipe("zephyr-7b-dpo-qlora"))
    assert (adapter.r, adapter.lora_alpha) == (128, 128)
