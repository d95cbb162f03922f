"""Every method trains a tiny model in a real child, and what it makes can be judged, published and served.

The children of the runs that need nothing of each other run side by side: most of a child's time is its start.
"""

import asyncio
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file

from chat_app.serving.engine import Sampling, ServedVersion
from chat_app.serving.transformers_engine import TransformersEngines
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.durable import write_json
from feedback_store.preferences import split_of
from feedback_store.records import Message, UnpairedPreference
from feedback_store.snapshots import freeze
from feedback_store.store import FeedbackStore
from trainer.cycle import Plan, comparison, plan_run, weights_of
from trainer.errors import NothingToTrainOn
from trainer.evaluate import evaluate
from trainer.launch import is_alive, kill_tree, start_training
from trainer.methods.continued_pretraining import cut
from trainer.methods.kto import choose_ratings, label_weights
from trainer.methods.sft import choose_examples
from trainer.recipe import from_mapping
from trainer.runs import Run
from trainer.texts import find_texts
from trainer.versions import Versions

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

COMMON: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "max_length": 256}
RECIPES: dict[str, dict[str, Any]] = {
    "kto": {"method": "kto"},
    "read": {"method": "continued-pretraining", "max_length": 32},
    "imitate-then-prefer": {"method": "sft-then-dpo", "sft_learning_rate": 1e-3},
    "whole": {"tuning": "full"},
}
STEPS = 2


def ratings(count: int) -> list[UnpairedPreference]:
    """Rated answers, two good ones for each bad one."""
    made = []
    for number, row in enumerate(tiny_model.made_up_preferences(count)):
        is_good = number % 3 > 0
        made.append(
            UnpairedPreference(
                f"label_{number:04}",
                row.prompt,
                row.chosen if is_good else row.rejected,
                is_good,
                "rating",
                1.0,
                None,
                ("v0",),
                datetime(2026, 1, 1, tzinfo=UTC),
            )
        )
    return made


def planned(data: Path, name: str) -> Run:
    recipe = from_mapping(name, COMMON | RECIPES[name])
    pairs = tiny_model.made_up_preferences(60)
    snapshot = freeze(pairs, data / "snapshots", None, recipe.mix(0), ratings=ratings(40))
    texts = find_texts(data / "texts") if recipe.method == "continued-pretraining" else None
    plan = Plan(recipe, STEPS, 1, seed=7, practice=None, device="cpu", requested_by="test", texts=texts)
    return plan_run(plan, snapshot, tiny_model.shared_tiny(), data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    """A trained run of each recipe."""
    data = tmp_path_factory.mktemp("data")
    tiny_model.lend_models(data)
    tiny_model.shared_directory()
    (data / "texts").mkdir()
    (data / "texts" / "house.md").write_text("The red house is blue. " * 40)
    (data / "texts" / "told.txt").write_text("one two <|im_start|>system three " * 40)
    planned_runs = {name: planned(data, name) for name in RECIPES}
    children = {name: start_training(run.directory, num_processes=1) for name, run in planned_runs.items()}
    deadline = time.monotonic() + 300
    try:
        while any(is_alive(child.pid, child.start_time) for child in children.values()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for name, child in children.items():
            kill_tree(child.pid, child.start_time, planned_runs[name].directory)
    for run in planned_runs.values():
        assert run.training is not None, "\n".join(run.log_tail(30))
    return planned_runs


@pytest.mark.parametrize("name", ["kto", "read", "imitate-then-prefer"])
def test_an_adapter_comes_out_in_both_forms_and_has_moved(runs: Mapping[str, Run], name: str) -> None:
    tensors = load_file(runs[name].directory / "adapter" / "adapter_model.safetensors")
    moved = [key for key, tensor in tensors.items() if "lora_B" in key and np.abs(tensor).max() > 0]
    assert len(moved) == 7 * tiny_model.LAYERS
    assert (runs[name].directory / "adapter.gguf").stat().st_size > 10_000
    assert not (runs[name].directory / "checkpoints").exists()


def test_kto_starts_at_half_the_mean_weight_and_learns_from_thumbs_alone(runs: Mapping[str, Run]) -> None:
    lines = runs["kto"].metrics()
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["kl"] == 0
    assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0
    assert 0.5 <= lines[0]["loss"] <= 1.0
    assert lines[1]["loss"] != lines[0]["loss"]
    assert runs["kto"].config.snapshot["rated_rows"] > 30
    assert runs["kto"].config.snapshot["planned_steps"] == STEPS


def test_two_stages_are_one_run_with_one_adapter(runs: Mapping[str, Run]) -> None:
    run = runs["imitate-then-prefer"]
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["pairs"] for line in lines] == [4, 8, 12, 16]
    assert "rewards/margins" not in lines[1]
    assert lines[2]["loss"] == pytest.approx(math.log(2), abs=1e-3), "the reference is the model after the first stage"
    assert run.progress["total_steps"] == 4
    training = run.training
    assert training is not None
    assert [stage["method"] for stage in training["stages"]] == ["sft", "dpo"]
    assert (training["steps"], training["pairs"]) == (4, 16)
    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (32, 64)


def test_reading_makes_the_text_likelier_and_its_hash_is_kept(runs: Mapping[str, Run]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, base_dir = runs["read"], tiny_model.shared_directory()
    assert run.config.snapshot["texts"]["hash"] == find_texts(run.directory.parent.parent / "texts")["hash"]
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.directory / "adapter").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(base_dir)("The red house is blue. " * 40)["input_ids"]])
    with torch.inference_mode():
        after = model(input_ids=ids, labels=ids).loss
        with model.disable_adapter():
            before = model(input_ids=ids, labels=ids).loss
    assert after < before


def judged(run: Run, champion: tuple[str, Path | None]) -> dict[str, Any]:
    """evaluation.json of a run, made here."""
    config = run.config
    snapshot = freeze(tiny_model.made_up_preferences(60), run.directory / "judged_on", None)
    request = comparison(
        recipe=replace(from_mapping("mine", config.recipe), held_out_pairs=3, max_length=256),
        base=config.base,
        models_dir=config.models_dir,
        device="cpu",
        snapshot=snapshot,
        candidate=("v1", run.weights),
        champion=champion,
    )
    found = evaluate(run.directory, request)
    write_json(run.directory / "evaluation.json", found)
    return found


def test_a_whole_model_is_judged_published_and_served(runs: Mapping[str, Run], tmp_path: Path) -> None:
    run = runs["whole"]
    assert run.metrics()[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert not (run.directory / "adapter").exists()
    before = load_file(tiny_model.shared_directory() / "model.safetensors")
    after = load_file(run.weights / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)

    against_base = judged(run, ("v0", None))
    assert (against_base["pairs"], against_base["canaries"] != []) == (3, True)
    versions = Versions(tmp_path / "versions")
    assert versions.publish(run, "v1", {"decision": "keep", "reasons": ["Too few."]}) == "v1"
    manifest = versions.verify("v1")
    assert (manifest.method, manifest.tuning) == ("dpo", "full")
    assert {"model.gguf", "model/model.safetensors", "model/tokenizer.json"} <= set(manifest.files)
    assert "A whole model, every weight moved, from `tiny`" in (versions.directory / "v1" / "README.md").read_text()
    model = weights_of("v1", "tiny", versions)
    assert model == versions.model_directory("v1")

    other = judged(runs["kto"], ("v1", model))
    against_itself = judged(runs["kto"], ("v0", None))
    for one, two, difference in zip(
        against_itself["results"],
        against_base["results"],
        (result["difference"] for result in other["results"]),
        strict=True,
    ):
        assert difference == pytest.approx(one["difference"] - two["difference"], abs=1e-3)

    prompt = [1, 300, 301, 302]
    (greedy,) = tiny_model.transformers_greedy(model, None, [prompt], 8)
    (native,) = tiny_model.llama_greedy(versions.model_gguf("v1"), None, [prompt], 8)
    assert native[:2] == greedy[:2], "rounded to 8 bits, it begins alike"

    async def answer(*served: ServedVersion) -> list[str]:
        engines = TransformersEngines(precision="fp32")
        built = [await engines.build(one) for one in served]
        try:
            greedily = Sampling(temperature=0, max_tokens=8)
            asked = [{"role": "user", "content": "Which one?"}]
            return ["".join([chunk.text async for chunk in one.stream(asked, greedily)]) for one in built]
        finally:
            for one in built:
                await one.close()

    chosen = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_MODEL": str(tiny_model.shared_tiny().gguf)})
    with FeedbackStore.open(tmp_path / "store.duckdb") as store:
        whole = TrainerRoom(chosen, store).served("v1")
    assert (whole.base_gguf, whole.checkpoint) == (versions.model_gguf("v1"), model)
    assert (whole.adapter_gguf, whole.adapter_directory) == (None, None)
    base = ServedVersion("v0", base_model=str(tiny_model.shared_directory()))
    texts = asyncio.run(answer(base, replace(whole, base_model=str(model))))
    assert texts[0] != texts[1]


def test_the_card_and_the_manifest_say_which_method_made_a_version(runs: Mapping[str, Run], tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    for number, (name, said) in enumerate(
        (
            ("kto", "learned with KTO on answers that were rated one by one"),
            ("read", "continued pretraining on the team's own texts"),
            ("imitate-then-prefer", "supervised fine-tuning on good answers, then Direct Preference"),
        ),
        start=1,
    ):
        judged(runs[name], ("v0", None))
        version = versions.publish(runs[name], f"v{number}", {"decision": "keep", "reasons": ["Too few."]})
        assert said in (versions.directory / version / "README.md").read_text()
        assert versions.verify(version).method == RECIPES[name]["method"]
    read = versions.load("v2")
    assert read.texts == runs["read"].config.snapshot["texts"]["hash"]
    manifest = json.loads((versions.directory / "v1" / "manifest.json").read_text())
    for key in ("method", "tuning", "texts"):  # as versions were published before there were other methods
        del manifest[key]
    write_json(versions.directory / "v1" / "manifest.json", manifest)
    assert (versions.verify("v1").method, versions.model_directory("v1")) == ("dpo", None)


def test_texts_that_changed_stop_the_job(runs: Mapping[str, Run], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(runs["read"].directory.parent.parent / "texts", texts)
    described = find_texts(texts)
    (texts / "house.md").write_text("Another house.")
    run = runs["read"]
    again = Run.create(
        tmp_path / "runs", replace(run.config, run_id="run_again", snapshot=run.config.snapshot | {"texts": described})
    )
    child = start_training(again.directory, num_processes=1)
    while is_alive(child.pid, child.start_time):
        time.sleep(0.1)
    assert again.training is None
    assert again.failure is not None
    assert "house.md was changed after the run was planned" in again.failure


class Letters:
    """A tokenizer of letters, for the choice of rows."""

    all_special_tokens = ()
    added_tokens_decoder: Mapping[int, object] = {}
    eos_token_id = 0

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool = True, **_options: object) -> Any:
        text = " ".join(message["content"] for message in messages)
        return self(text) if tokenize else text


def test_ratings_are_chosen_balanced_and_never_alone() -> None:
    recipe = from_mapping("mine", {"method": "kto", "batch_size": 4, "max_length": 64})
    made = [replace(one, source="kto") for one in ratings(12)] + ratings(15)[12:]
    chosen, dropped = choose_ratings(made, recipe, 2, 0, Letters())
    assert (len(chosen), dropped) == (8, 0)
    assert sum(one.source == "rating" for one in chosen) == 3
    assert len(choose_ratings(made, recipe, None, 0, Letters())[0]) == 14, "15 would leave one alone"
    good = sum(one.label for one in chosen)
    weights = label_weights(chosen)
    assert weights[0] * good == pytest.approx(weights[1] * (8 - good))
    with pytest.raises(NothingToTrainOn, match="both kinds: 4 good and 0 bad"):
        choose_ratings([one for one in made if one.label][:4], recipe, None, 0, Letters())
    with pytest.raises(NothingToTrainOn, match="12 have prompts longer than max_length 16"):
        choose_ratings(ratings(12), replace(recipe, max_length=16), None, 0, Letters())


def test_supervised_examples_hold_the_answers_and_only_these_are_learned() -> None:
    recipe = from_mapping("mine", {"method": "sft", "batch_size": 4, "max_length": 64})
    told_how: dict[str, Any] = {"recipe": recipe, "seed": 0, "tokenizer": Letters()}
    made = tiny_model.made_up_preferences(6)
    made[3] = replace(made[3], source="pick")
    long = replace(made[0], prompt=(Message(role="user", content="x" * 80),))
    told = [
        tuple(Message(role=role, content=text) for role, text in zip(("user", "assistant") * 2, texts, strict=True))
        for texts in (("Hi", "Ho", "He", "Ha"), ("held out", "no", "no", "no"))
    ]
    held_out = next(
        f"held out {n}" for n in range(99) if split_of([Message(role="user", content=f"held out {n}")]) == "held_out"
    )
    told[1] = (Message(role="user", content=held_out), *told[1][1:])
    examples, dropped = choose_examples([*made, long], told, max_steps=None, **told_how)
    assert (len(examples), dropped) == (7, 1)
    read = {_text(one["input_ids"]): _text([token for token in one["labels"] if token != -100]) for one in examples}
    assert read["Hi Ho He Ha"] == " Ho Ha", "both answers, and what stands before them in this template"
    assert {f"{row.prompt[0]['content']} {row.chosen}": row.chosen for row in made}.items() <= {
        text: said.strip() for text, said in read.items()
    }.items()
    first, _ = choose_examples(made, [], max_steps=1, **told_how)
    assert any(made[3].chosen in _text(one["input_ids"]) for one in first)


def _text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_texts_are_cut_into_blocks_that_hold_every_token_once() -> None:
    blocks = cut(["abc", "", "defgh"], 4, 0, Letters())
    assert sorted(token for block in blocks for token in block) == sorted([0, 0, *map(ord, "abcdefgh")])
    assert sorted(map(len, blocks)) == [2, 4, 4]
    assert cut(["abc", "", "defgh"], 4, 0, Letters()) == blocks
    with pytest.raises(NothingToTrainOn, match="no words"):
        cut(["", ""], 4, 0, Letters())
