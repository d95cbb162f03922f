"""The training child really trains: one process and two learn the same, the first loss is ln 2, parameters move."""

import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_model

from feedback_store.durable import write_json
from feedback_store.snapshots import freeze
from trainer.cycle import Plan, plan_run
from trainer.errors import Diverged, NothingToTrainOn, WrongStart
from trainer.launch import is_alive, kill_tree, start_training
from trainer.methods.dpo import choose_rows, first_loss
from trainer.progress import check_step, metrics_line, pairs_seen
from trainer.recipe import from_mapping, load_recipe
from trainer.reference_cache import REFERENCES
from trainer.runs import Run

RECIPE = from_mapping("mine", {"learning_rate": 1e-3, "batch_size": 4, "max_length": 256})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    tiny_model.lend_models(directory)
    return directory


def planned(data: Path, num_processes: int = 1) -> Run:
    """A run of three steps, the last one short, not started; no reference is known."""
    shutil.rmtree(data / "models" / REFERENCES, ignore_errors=True)
    snapshot = freeze(tiny_model.made_up_preferences(11), data / "snapshots", None)
    plan = Plan(RECIPE, 3, num_processes, seed=7, practice=None, device="cpu", requested_by="test")
    return plan_run(plan, snapshot, tiny_model.shared_tiny(), data)


def trained(run: Run, launched_processes: int | None = None) -> Run:
    child = start_training(run.directory, num_processes=launched_processes or run.config.num_processes)
    deadline = time.monotonic() + 180
    try:
        while is_alive(child.pid, child.start_time):
            assert time.monotonic() < deadline, "\n".join(run.log_tail(30))
            time.sleep(0.1)
    finally:
        kill_tree(child.pid, child.start_time, run.directory)
    return run


@pytest.fixture(scope="module")
def one_process(data: Path) -> Run:
    return trained(planned(data))


def test_it_trains_and_says_so_step_by_step(one_process: Run) -> None:
    assert one_process.training is not None, "\n".join(one_process.log_tail(30))
    lines = one_process.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["pairs"] for line in lines] == [4, 8, 11]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[2]["loss"] < lines[0]["loss"]
    assert lines[2]["rewards/margins"] > 0 == lines[0]["rewards/margins"]
    for line in lines:
        assert {"time", "loss", "grad_norm", "learning_rate", "rewards/accuracies", "logps/chosen"} <= set(line)
        assert line["lengths/rejected"] > line["lengths/chosen"] > 0
        assert all(isinstance(value, int | float) for value in line.values())
    assert one_process.progress["total_steps"] == 3
    training = one_process.training
    assert (training["steps"], training["pairs"], training["dropped_over_long"]) == (3, 11, 0)
    assert training["fast_step"] is True
    assert training["references"] == {"cached": 0, "computed": 11}
    measured = training["measured"]
    assert 200e6 < measured["peak_memory_bytes"] < 4e9
    assert measured["peak_device_memory_bytes"] is None
    assert measured["training_s"] >= lines[2]["time"] - lines[0]["time"]
    assert measured["loading_s"] > 0
    assert measured["training_began"] <= lines[0]["time"] <= lines[2]["time"] <= measured["ended"]


def test_the_adapter_is_there_in_both_forms_and_has_moved(one_process: Run) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(one_process.directory / "adapter" / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if "lora_B" in name and abs(tensor).max() > 0]
    assert len(moved) == 7 * tiny_model.LAYERS
    assert (one_process.directory / "adapter.gguf").stat().st_size > 10_000
    config = json.loads((one_process.directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not (one_process.directory / "adapter" / "README.md").exists()


def test_two_processes_learn_the_same(one_process: Run, data: Path) -> None:
    both = trained(planned(data, num_processes=2))
    assert both.training is not None, "\n".join(both.log_tail(30))
    assert both.training["references"] == {"cached": 0, "computed": 11}
    assert one_process.training is not None
    memory = [run["measured"]["peak_memory_bytes"] for run in (one_process.training, both.training)]
    assert 1.2 * memory[0] < memory[1] < 2.2 * memory[0], "the memory of both processes counts"
    alone, together = one_process.metrics(), both.metrics()
    assert [line["step"] for line in together] == [1, 2, 3]
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=1e-3)
        assert other["pairs"] == one["pairs"]


def test_another_number_of_processes_than_asked_for_is_refused(data: Path) -> None:
    run = planned(data)
    write_json(run.directory / "config.json", {**asdict(run.config), "num_processes": 2})
    trained(run, launched_processes=1)
    assert run.training is None
    assert run.failure is not None
    assert run.failure.startswith("2 processes were asked for, 1 started.")


class Words:
    """A tokenizer that counts words, for the choice of rows."""

    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict[int, object]] = {}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool = True, **_options: object
    ) -> dict[str, list[int]] | str:
        text = " ".join(message["content"] for message in messages)
        return {"input_ids": [hash(word) for word in text.split()]} if tokenize else text


def test_own_picks_come_before_the_rest_when_steps_are_few() -> None:
    made = tiny_model.made_up_preferences(40)
    made[30:36] = [replace(preference, source="pick") for preference in made[30:36]]
    chosen, dropped = choose_rows(made, RECIPE, 2, 0, Words())
    assert dropped == 0
    assert len(chosen) == 8
    assert sum(preference.source == "pick" for preference in chosen) == 6
    assert choose_rows(made, RECIPE, 2, 0, Words())[0] == chosen
    assert choose_rows(made, RECIPE, 2, 1, Words())[0] != chosen
    everything, _ = choose_rows(made, RECIPE, None, 0, Words())
    assert len(everything) == 40
    assert everything != made


def test_over_long_prompts_are_dropped_and_counted() -> None:
    made = tiny_model.made_up_preferences(4)
    long = replace(made[0], preference_id="pref_long", prompt=({"role": "user", "content": "word " * 300},))
    chosen, dropped = choose_rows([*made, long], RECIPE, None, 0, Words())
    assert (len(chosen), dropped) == (4, 1)
    with pytest.raises(NothingToTrainOn, match="max_length 256"):
        choose_rows([long], RECIPE, None, 0, Words())


@pytest.mark.parametrize(
    ("step", "logs", "error"),
    [
        (1, {"loss": 0.70, "grad_norm": 1.0}, WrongStart),
        (3, {"loss": math.nan, "grad_norm": 1.0}, Diverged),
        (3, {"loss": 0.5, "grad_norm": math.inf}, Diverged),
        (1, {"loss": math.nan, "grad_norm": 1.0}, Diverged),
    ],
)
def test_a_step_gone_wrong_stops_the_job(step: int, logs: dict[str, float], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"0\.7000|nan|inf"):
        check_step(step, logs, first_loss(RECIPE, logs))


def test_good_steps_go_on() -> None:
    check_step(1, {"loss": math.log(2), "grad_norm": 5.0}, first_loss(RECIPE, {}))
    check_step(2, {"loss": 5.0, "grad_norm": 5.0}, first_loss(RECIPE, {}))


def test_a_line_keeps_what_the_design_names() -> None:
    logs = {
        "loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "rewards/chosen": 0.1,
        "logps/chosen": -3.0,
        "epoch": 1,
    }
    line = metrics_line(2, 16, logs, 100.0)
    assert line == {
        "step": 2,
        "time": 100.0,
        "pairs": 16,
        "loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "rewards/chosen": 0.1,
        "logps/chosen": -3.0,
    }


def test_pairs_seen_over_short_last_steps() -> None:
    assert [pairs_seen(step, 4, 10) for step in range(1, 7)] == [4, 8, 10, 14, 18, 20]


def test_the_micro_batch_divides_the_batch() -> None:
    recipe = load_recipe("practice")
    assert recipe.per_process_batch(2) % math.gcd(recipe.micro_batch_size, recipe.per_process_batch(2)) == 0
