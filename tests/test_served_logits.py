"""What the served model thinks of the next token is what transformers with PEFT thinks: base and adapter.

Tolerances come from the base: whatever the two disagree by without an adapter is rounding (half-precision cache,
quantised products), and an adapter may add no more than a few times that.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from chat_app.serving.engine import ServedVersion
from trainer import gguf_adapter
from trainer.served_model import requantise

pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[1, 520, 198, 300, 17, 2, 198, 1], list(range(40, 80)), list(range(300, 700, 7))]
LIKELY = 40  # how many of the likeliest tokens are compared

Thoughts = list[dict[int, float]]  # for each prompt: log-probabilities of the likeliest next tokens


def served(gguf: Path, adapter: Path | None, log_dir: Path) -> Thoughts:
    """From the engine's own server."""
    from chat_app.serving.llama_engine import build_llama_engine

    async def ask() -> Thoughts:
        engine = await build_llama_engine(ServedVersion("v1", gguf, adapter), log_dir=log_dir)
        try:
            return [await _next(engine, prompt) for prompt in PROMPTS]
        finally:
            await engine.close()

    async def _next(engine: object, prompt: list[int]) -> dict[int, float]:
        body = {"prompt": prompt, "n_predict": 1, "n_probs": LIKELY, "temperature": 0, "cache_prompt": False}
        told = await engine._ask("/completion", body)  # type: ignore[attr-defined]
        return {one["id"]: one["logprob"] for one in told["completion_probabilities"][0]["top_logprobs"]}

    return asyncio.run(ask())


def in_transformers(directory: Path, adapter: Path | None) -> list[np.ndarray]:
    """From transformers, with PEFT where there is an adapter: all log-probabilities."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits = [model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
        return [one.log_softmax(-1).numpy() for one in logits]


def apart(one: Thoughts, other: list[np.ndarray]) -> float:
    """The largest difference between the two in the log-probability of a likely token."""
    return max(
        abs(value - thought[token])
        for likely, thought in zip(one, other, strict=True)
        for token, value in likely.items()
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.random_adapter(tiny_model.shared_directory(), tmp_path_factory.mktemp("adapter"), scale=1.0)


def test_base_and_adapter_agree_and_a_wrong_order_of_rows_would_show(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, gguf = tiny_model.shared_directory(), tiny_model.shared_tiny().gguf
    assert gguf is not None
    gguf_adapter.write_gguf_adapter(adapter, base, tmp_path / "right.gguf")
    monkeypatch.setattr(gguf_adapter, "permute_rows", lambda rows, heads: rows)
    gguf_adapter.write_gguf_adapter(adapter, base, tmp_path / "wrong.gguf")

    plain, adapted = in_transformers(base, None), in_transformers(base, adapter)
    noise = apart(served(gguf, None, tmp_path), plain)
    assert noise < 0.02
    assert apart(served(gguf, tmp_path / "right.gguf", tmp_path), adapted) < max(3 * noise, 0.02)
    assert apart(served(gguf, tmp_path / "wrong.gguf", tmp_path), adapted) > 10 * max(3 * noise, 0.02)
    assert apart(served(gguf, None, tmp_path), adapted) > 0.5, "the adapter must be loud"


def test_in_the_served_form_too(adapter: Path, tmp_path: Path) -> None:
    base, gguf = tiny_model.shared_directory(), tiny_model.shared_tiny().gguf
    assert gguf is not None
    requantise(gguf, tmp_path / "q8.gguf", "Q8_0")
    gguf_adapter.write_gguf_adapter(adapter, base, tmp_path / "adapter.gguf")
    noise = apart(served(tmp_path / "q8.gguf", None, tmp_path), in_transformers(base, None))
    assert noise < 1, "random weights are steep, but not that steep"
    assert apart(served(tmp_path / "q8.gguf", tmp_path / "adapter.gguf", tmp_path), in_transformers(base, adapter)) < (
        3 * noise
    )
