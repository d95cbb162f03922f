"""CHILD: greedy answers of one version to the questions of an evaluation, and its perplexity on plain prose.

The questions are people's own held-out prompts, filled up from a fixed list; greedy, so that the same weights write the
same twice. The prose ships with the package and belongs to nobody's preferences: what a version lost there, it forgot.
Used by `evaluate.py`. Not covered: sampling, judging the answers (`answer_quality.py` only describes them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback_store.control_text import neutralised
from feedback_store.records import Message, Preference
from trainer.answer_quality import Answer
from trainer.tokens import markers

QUESTIONS = 8
MAX_TOKENS = 96
PROMPT_TOKENS = 512
FIXED = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Write a short e-mail that moves a meeting to Tuesday.",
    "What is the difference between weather and climate?",
    "Explain what a prime number is to a child.",
    "Write a Python function that reverses a string.",
    "Tell me a very short story about a lighthouse.",
)
PROSE = Path(__file__).parent / "prose.txt"


def questions(held_out: Sequence[Preference], wanted: int = QUESTIONS) -> list[tuple[Message, ...]]:
    """Half of them people's own held-out prompts, where there are so many, each once; the rest fixed."""
    own: dict[str, tuple[Message, ...]] = {}
    for preference in sorted(held_out, key=lambda one: one.preference_id):
        if preference.source == "pick" and len(own) < wanted // 2:
            own.setdefault(preference.prompt[-1]["content"], preference.prompt)
    fixed = [(Message(role="user", content=text),) for text in FIXED]
    return [*own.values(), *fixed][:wanted]


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[Message, ...]],
    *,
    max_tokens: int | None = None,
    prompt_tokens: int | None = None,
) -> list[Answer]:
    """The greedy answer to each prompt, in one batch, at most `max_tokens` tokens (by default `MAX_TOKENS`).

    Prompts longer than `prompt_tokens` (by default `PROMPT_TOKENS`) are left out.
    """
    import torch

    broken, limit = markers(tokenizer), prompt_tokens or PROMPT_TOKENS
    ids = [
        tokenizer.apply_chat_template(
            neutralised(prompt, broken), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]
    kept = [(prompt, one) for prompt, one in zip(prompts, ids, strict=True) if len(one) <= limit]
    if not kept:
        return []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(one) for _, one in kept)
    rows = torch.tensor([[pad] * (width - len(one)) + one for _, one in kept], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for _, one in kept], device=model.device)
    with torch.inference_mode():
        written = model.generate(
            input_ids=rows,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_tokens or MAX_TOKENS,
            pad_token_id=pad,
        )[:, width:].tolist()
    ends = _ends(model, tokenizer)
    return [
        _answer(tokenizer, prompt[-1]["content"], tokens, ends)
        for (prompt, _), tokens in zip(kept, written, strict=True)
    ]


def prose_nats(model: Any, tokenizer: Any) -> float:
    """Mean negative log-likelihood of a token of the prose, in nats; perplexity is its exponential."""
    import torch

    total, count = 0.0, 0
    for paragraph in PROSE.read_text(encoding="utf-8").split("\n\n"):
        ids = torch.tensor([tokenizer(paragraph.strip())["input_ids"]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1].float()
        each = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, 1:, None])
        total -= float(each.double().sum())
        count += each.shape[0]
    return total / count if math.isfinite(total) else math.inf


def _ends(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}


def _answer(tokenizer: Any, question: str, tokens: list[int], ends: set[int]) -> Answer:
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()
    return Answer(question=question, text=text, tokens=length, finished=length < len(tokens))
