"""Versions: published in one rename, verified by their hashes, described for a reader who has nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_runs import config

from feedback_store.durable import write_json
from trainer.errors import VersionDamaged, VersionNotFound
from trainer.evaluate import count
from trainer.runs import Run
from trainer.versions import Versions

VERDICT = {"decision": "keep", "reasons": ["1 win, 0 ties, 1 loss on 2 held-out pairs.", "Not enough."]}


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "versions")


def write_adapter(directory: Path, values: NDArray[Any]) -> None:
    """An adapter of one tensor, in both forms."""
    save_file({"lora_A": values}, directory / "adapter" / "adapter_model.safetensors")
    writer = GGUFWriter(directory / "adapter.gguf", "llama")
    writer.add_tensor("lora_a", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trained_run(tmp_path: Path, run_id: str = "run_20261122-231500_aaaa", practice: str | None = None) -> Run:
    """A run directory as the children leave it, the weights made up."""
    snapshot = {"hash": "abc", "directory": "x", "planned_steps": 4, "train_rows": 30, "held_out_rows": 2}
    snapshot["counts"] = {"pick": 30, "trl": 2}
    run = Run.create(tmp_path / "runs", replace(config(snapshot=snapshot), run_id=run_id, practice=practice))
    (run.directory / "adapter").mkdir()
    (run.directory / "adapter" / "adapter_config.json").write_text("{}")
    write_adapter(run.directory, np.full((2, 4), len(run_id), dtype=np.float32))
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    write_json(base / "zephyr_base.json", {"sha256": "f00", "dequantized_from": "Q4_1", "licence": "apache-2.0"})
    training = {"steps": 4, "pairs": 30, "dropped_over_long": 1, "base_directory": str(base)}
    write_json(run.directory / "training.json", training)
    counted = count([{"difference": 1.0}, {"difference": -1.0}], 0.1)
    write_json(run.directory / "evaluation.json", {**counted, "champion": "v0", "candidate": "v1", "results": []})
    return run


def test_published_whole_and_verified(tmp_path: Path, versions: Versions) -> None:
    assert versions.names() == []
    assert versions.next_name(None) == "v1"
    run = trained_run(tmp_path)
    assert versions.publish(run, "v1", VERDICT) == "v1"

    manifest = versions.verify("v1")
    assert (manifest.version, manifest.base, manifest.snapshot, manifest.run_id) == ("v1", "tiny", "abc", run.run_id)
    assert (manifest.recipe, manifest.seed, manifest.base_sha256) == ("dpo-lora", 0, "f00")
    assert manifest.evaluation["wins"] == 1
    assert manifest.verdict == VERDICT
    assert set(manifest.files) == {
        "README.md",
        "adapter.gguf",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "evaluation.json",
    }
    assert versions.adapter_gguf("v1").read_bytes() == (run.directory / "adapter.gguf").read_bytes()
    assert versions.canaries("v1") == []
    assert (versions.adapter_directory("v1") / "adapter_config.json").is_file()


def test_the_model_card_tells_the_story(tmp_path: Path, versions: Versions) -> None:
    versions.publish(trained_run(tmp_path), "v1", VERDICT)
    card = (versions.directory / "v1" / "README.md").read_text()
    for part in (
        "base_model: tiny",
        "license: apache-2.0",
        "dequantized from Q4_1",
        "30 preferences to train on",
        "30 from pick",
        "1 rows with over-long prompts",
        "learning_rate 0.0001",
        "Evaluation against v0",
        "Verdict when it was trained: **keep**",
    ):
        assert part in card, part
    assert str(tmp_path) not in card


def test_publishing_a_run_again_changes_nothing(tmp_path: Path, versions: Versions) -> None:
    run = trained_run(tmp_path)
    versions.publish(run, "v1", VERDICT)
    before = versions.load("v1")
    assert versions.publish(run, versions.next_name(None), VERDICT) == "v1"
    assert versions.names() == ["v1"]
    assert versions.load("v1") == before


def test_names_count_on_and_practice_shows(tmp_path: Path, versions: Versions) -> None:
    for number in range(1, 12):
        taste = "shorter" if number == 3 else None
        name = versions.next_name(taste)
        run = trained_run(tmp_path, f"run_20261122-2315{number:02}_aaaa", taste)
        assert versions.publish(run, name, VERDICT) == name
    assert versions.names()[1:4] == ["v2", "v3-practice-shorter", "v4"]
    assert versions.names()[-1] == "v11"
    assert versions.load("v3-practice-shorter").practice == "shorter"
    assert "**Practice**" in (versions.directory / "v3-practice-shorter" / "README.md").read_text()


def test_a_version_without_its_manifest_does_not_exist(tmp_path: Path, versions: Versions) -> None:
    versions.publish(trained_run(tmp_path), "v1", VERDICT)
    (versions.directory / "v1" / "manifest.json").unlink()
    assert versions.names() == []
    with pytest.raises(VersionNotFound):
        versions.load("v1")
    assert versions.next_name(None) == "v2"


def test_a_publication_that_breaks_off_leaves_nothing(tmp_path: Path, versions: Versions) -> None:
    run = trained_run(tmp_path)
    (run.directory / "adapter.gguf").unlink()
    with pytest.raises(FileNotFoundError):
        versions.publish(run, "v1", VERDICT)
    assert list(versions.directory.iterdir()) == []


@pytest.mark.parametrize("name", ["v0", "v9", "champion", "../runs", "v1/../v1", ""])
def test_what_is_not_there(tmp_path: Path, versions: Versions, name: str) -> None:
    versions.publish(trained_run(tmp_path), "v1", VERDICT)
    with pytest.raises(VersionNotFound):
        versions.load(name)


def test_damage_is_found_and_named(tmp_path: Path, versions: Versions) -> None:
    versions.publish(trained_run(tmp_path), "v1", VERDICT)
    shutil.copytree(versions.directory / "v1", versions.directory / "v2")
    (versions.directory / "v1" / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(VersionDamaged, match=r"adapter\.gguf is not the file"):
        versions.verify("v1")
    (versions.directory / "v1" / "adapter.gguf").unlink()
    with pytest.raises(VersionDamaged, match="missing"):
        versions.verify("v1")
    (versions.directory / "v2" / "manifest.json").write_text("{")
    with pytest.raises(VersionDamaged, match=r"manifest\.json"):
        versions.verify("v2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "adapter.gguf"])
def test_weights_that_are_not_finite_are_found_although_the_hash_is_right(
    tmp_path: Path, versions: Versions, value: float, name: str
) -> None:
    run = trained_run(tmp_path)
    values = np.zeros((3, 5), dtype=np.float32)
    write_adapter(run.directory, values)
    good = {path: path.read_bytes() for path in run.directory.rglob("adapter*.*")}
    values[2, 3] = value
    write_adapter(run.directory, values)
    for path, content in good.items():
        if path != run.directory / name:
            path.write_bytes(content)
    versions.publish(run, "v1", VERDICT)
    with pytest.raises(VersionDamaged, match=rf"{Path(name).name} holds numbers that are not finite, in lora_"):
        versions.verify("v1")


def test_a_file_that_is_no_adapter_is_damage_too(tmp_path: Path, versions: Versions) -> None:
    run = trained_run(tmp_path)
    (run.directory / "adapter" / "adapter_model.safetensors").write_bytes(b"no weights at all")
    versions.publish(run, "v1", VERDICT)
    with pytest.raises(VersionDamaged, match=r"adapter_model\.safetensors cannot be read"):
        versions.verify("v1")
