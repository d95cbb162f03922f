"""The base: one GGUF file, found, converted once and whole."""

from pathlib import Path

import pytest
import tiny_model

from trainer import base_model
from trainer.base_model import BaseModel, base_directory, base_provenance, embedded, ensure_base
from trainer.errors import BaseModelMissing


def test_the_embedded_model_is_found_without_importing_torch() -> None:
    model = embedded()
    assert model.name == "smollm2-135m-instruct"
    assert model.gguf is not None
    assert model.gguf.is_file()
    assert BaseModel.from_dict(model.as_dict()) == model


def test_a_missing_package_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(BaseModelMissing, match="make setup"):
        embedded()


def test_converting_twice_is_converting_once() -> None:
    directory = tiny_model.shared_directory()
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert tiny_model.shared_directory() == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    facts = base_provenance(directory)
    assert facts["name"] == "tiny"
    assert facts["licence"] == "apache-2.0"
    assert facts["dequantized_from"] is None
    assert not list(directory.parent.glob(".*")), "a conversion left its temporary directory"


def test_the_tokenizer_splits_digits_as_llama_cpp_does() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model.shared_directory())
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("\n\n2 and 17", add_special_tokens=False)["input_ids"])
    assert pieces[:2] == ["ĊĊ", "2"]
    assert pieces[-2:] == ["1", "7"]


def test_another_file_gets_another_directory(tmp_path: Path) -> None:
    one = tiny_model.tiny_base(tmp_path / "one.gguf", seed=0)
    other = tiny_model.tiny_base(tmp_path / "other.gguf", seed=1)
    assert base_directory(one, tmp_path) != base_directory(other, tmp_path)
    again = tiny_model.tiny_base(tmp_path / "again.gguf", seed=0)
    assert base_directory(one, tmp_path) == base_directory(again, tmp_path)


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    directory = tiny_model.shared_directory()
    assert ensure_base(BaseModel("mine", directory=directory), tmp_path) == directory
    with pytest.raises(BaseModelMissing, match=r"config\.json"):
        ensure_base(BaseModel("mine", directory=tmp_path), tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMissing, match=r"gone\.gguf"):
        ensure_base(BaseModel("gone", tmp_path / "gone.gguf"), tmp_path)
    with pytest.raises(ValueError, match="no GGUF file, no directory"):
        BaseModel("nothing")
    with pytest.raises(ValueError, match="directory name"):
        BaseModel("a/b", tmp_path)


def test_a_hub_that_does_not_answer_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = BaseModel("owner--name", hub_id="owner/name")
    assert BaseModel.from_dict(base.as_dict()) == base
    with pytest.raises(
        BaseModelMissing, match=r"The hub did not give the model 'owner/name': .*Check the id and the net"
    ):
        ensure_base(base, tmp_path)


def test_what_was_downloaded_once_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel("owner--name", hub_id="owner/name")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, local_dir, **_: asked.append(local_dir.mkdir())
    )
    assert ensure_base(base, tmp_path) == ensure_base(base, tmp_path) == tmp_path / "owner--name"
    assert len(asked) == 1
