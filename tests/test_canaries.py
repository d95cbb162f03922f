"""Canaries: recorded by transformers, kept by llama.cpp on the same weights, and broken by any other weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from chat_app.serving.engine import Canary, EngineStartFailed, ServedVersion
from chat_app.serving.llama_engine import build_llama_engine
from chat_app.serving.verification import check_canaries
from trainer import canaries
from trainer.canaries import QUESTIONS, record_canaries
from trainer.gguf_adapter import write_gguf_adapter

pytest.importorskip("xllamacpp", reason="the native engine is not installed")
# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(seed: int, directory: Path) -> tuple[Any, Any, Path]:
    """Model, tokenizer and GGUF adapter of the tiny base with a random adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model.shared_directory()
    adapter = tiny_model.random_adapter(base, directory / f"adapter{seed}", seed)
    write_gguf_adapter(adapter, base, directory / f"adapter{seed}.gguf")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model, AutoTokenizer.from_pretrained(base), directory / f"adapter{seed}.gguf"


def test_what_transformers_recorded_llama_cpp_keeps_on_these_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canaries, "CLEAR_NATS", 0.3)  # the tiny model is sure of little
    recorded = {}
    adapters = {}
    for seed in (1, 2):
        model, tokenizer, adapters[seed] = adapted(seed, tmp_path)
        recorded[seed] = tuple(
            Canary(tuple(one["messages"]), one["begins"], one["prompt"]) for one in record_canaries(model, tokenizer)
        )
        assert len(recorded[seed]) == canaries.KEPT
        assert {one.messages[0]["content"] for one in recorded[seed]} <= set(QUESTIONS)

    async def serve(seed: int, kept: tuple[Canary, ...]) -> None:
        served = ServedVersion("v1", tiny_model.shared_tiny().gguf, adapters[seed])
        engine = await build_llama_engine(served, log_dir=tmp_path)
        try:
            await check_canaries(engine, kept)
        finally:
            await engine.close()

    for seed in (1, 2):
        asyncio.run(serve(seed, recorded[seed]))
    with pytest.raises(EngineStartFailed, match="not the weights that were judged"):
        asyncio.run(serve(1, recorded[2]))


def test_an_answer_is_kept_up_to_the_first_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = adapted(1, tmp_path)

    def beginnings(nats: float) -> list[str]:
        monkeypatch.setattr(canaries, "CLEAR_NATS", nats)
        return [
            next((one["begins"] for one in record_canaries(model, tokenizer) if one["messages"] == asked), "")
            for asked in ([{"role": "user", "content": question}] for question in QUESTIONS)
        ]

    monkeypatch.setattr(canaries, "MAX_TOKENS", 6)
    monkeypatch.setattr(canaries, "KEPT", len(QUESTIONS))
    bold, careful = beginnings(0.0), beginnings(0.5)
    assert all(long.startswith(short) for long, short in zip(bold, careful, strict=True))
    assert bold != careful
    assert beginnings(1e9) == [""] * len(QUESTIONS)
    assert all(len(tokenizer(text)["input_ids"]) <= 8 for text in bold)
