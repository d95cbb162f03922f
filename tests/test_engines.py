"""The composition root: which base the settings name, and the engine that serves it in the form it reads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from symbol_gguf import publish_symbol_version
from tiny_model import lend_models, shared_directory, shared_tiny

from chat_app.engines import CannotServe, base_model, engine_builder
from chat_app.serving.engine import EngineStartFailed, Sampling
from chat_app.settings import Settings, load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.store import FeedbackStore
from trainer.base_model import embedded


def settings(directory: Path, **values: str) -> Settings:
    environment = {f"ZLOOP_{name.upper()}": value for name, value in values.items()}
    return load_settings({"ZLOOP_DATA_DIR": str(directory), **environment})


def test_auto_is_the_embedded_model_where_no_gpu_holds_zephyr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_model(settings(tmp_path)) == embedded()
    for holds, name in ((False, embedded().name), (True, "huggingfaceh4--zephyr-7b-beta")):
        monkeypatch.setattr("chat_app.engines._gpu_holds_zephyr", lambda holds=holds: holds)
        assert base_model(settings(tmp_path, engine="transformers")).name == name
        assert base_model(settings(tmp_path)) == embedded()


def test_a_directory_a_file_and_a_hub_id_are_told_apart(tmp_path: Path) -> None:
    gguf, directory = str(shared_tiny().gguf), str(shared_directory())
    assert base_model(settings(tmp_path, engine="transformers", model=gguf)).gguf == Path(gguf)
    assert base_model(settings(tmp_path, engine="transformers", model=directory)).directory == Path(directory)
    assert base_model(settings(tmp_path, engine="transformers", model="owner/Name")).hub_id == "owner/Name"
    with pytest.raises(CannotServe, match="no GGUF file, no directory"):
        base_model(settings(tmp_path, engine="transformers", model="nothing"))
    for model in (directory, "owner/Name"):
        with pytest.raises(CannotServe, match="ZLOOP_ENGINE=transformers"):
            base_model(settings(tmp_path, model=model))


def test_the_transformers_engine_serves_a_gguf_base_from_its_directory(tmp_path: Path) -> None:
    chosen = settings(tmp_path, engine="transformers", model=str(shared_tiny().gguf))
    lend_models(tmp_path)

    async def run() -> None:
        with FeedbackStore.open(tmp_path / "store.duckdb") as store:
            served = TrainerRoom(chosen, store).served("v0")
        assert served.base_gguf == shared_tiny().gguf
        engine = await engine_builder(chosen)(served)
        said = [chunk async for chunk in engine.stream([{"role": "user", "content": "Hello"}], Sampling(max_tokens=4))]
        assert said[-1].finish_reason is not None
        await engine.close()

    asyncio.run(run())


def test_canaries_are_for_engines_with_weights(tmp_path: Path) -> None:
    publish_symbol_version(tmp_path / "versions", 1, "tiny")
    with FeedbackStore.open(tmp_path / "store.duckdb") as store:
        for engine, count in (("llama", 1), ("scripted", 0)):
            chosen = settings(tmp_path, engine=engine, model=str(shared_tiny().gguf))
            assert len(TrainerRoom(chosen, store).served("v1").canaries) == count


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chosen = settings(tmp_path, engine="transformers", model="owner/name")

    async def run() -> None:
        with FeedbackStore.open(tmp_path / "store.duckdb") as store:
            served = TrainerRoom(chosen, store).served("v0")
        with pytest.raises(EngineStartFailed, match="The hub did not give the model 'owner/name'"):
            await engine_builder(chosen)(served)

    asyncio.run(run())
