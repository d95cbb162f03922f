"""Canaries: how a version begins its greedy answers to fixed questions, so that a server can see it serves it.

Recorded by `evaluate.py`, in the child that has the weights; kept in evaluation.json; checked before a swap by whoever
serves. An answer is kept up to the first token that was no clear winner: on the same weights the lead of the winner was
seen to differ by up to 0.53 nats between transformers and llama.cpp (embedded model), so `CLEAR_NATS` win everywhere.

They find what is grossly wrong: another template, another base, broken or no weights. Two versions that differ little
may begin alike; which files are served is what the hashes say. Not covered: whether the answers are any good.
"""

from __future__ import annotations

from typing import Any

from feedback_store.records import Message

QUESTIONS = (
    "Say the days of the week in order.",
    "Write a Python function that adds two numbers.",
    "Explain what a database is.",
    "Who was Albert Einstein?",
    "Write an e-mail that declines a meeting.",
    "What is the largest ocean?",
)
KEPT = 2  # a new engine checks them before it serves, and it has two seconds for everything
MAX_TOKENS = 12
CLEAR_NATS = 1.0


def record_canaries(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Ask `model` every question greedily: {"messages", "prompt", "begins"} of the `KEPT` longest clear beginnings."""
    canaries: list[dict[str, Any]] = []
    for question in QUESTIONS:
        messages = [Message(role="user", content=question)]
        if begins := _clear_beginning(model, tokenizer, messages):
            canaries.append({"messages": messages, "prompt": _prompt_text(tokenizer, messages), "begins": begins})
    return sorted(canaries, key=lambda canary: -len(canary["begins"]))[:KEPT]


def _clear_beginning(model: Any, tokenizer: Any, messages: list[Message]) -> str:
    """The greedy answer before the first special token, or the first that is not `CLEAR_NATS` ahead of the second."""
    import torch

    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].to(model.device)
    special, cache = set(tokenizer.all_special_ids), None
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < MAX_TOKENS:
            seen = model(input_ids=ids, past_key_values=cache, use_cache=True)
            best = seen.logits[0, -1].float().topk(2)
            token = int(best.indices[0])
            if token in special or float(best.values[0] - best.values[1]) < CLEAR_NATS:
                break
            answer.append(token)
            ids, cache = best.indices[:1].reshape(1, 1), seen.past_key_values
    text = str(tokenizer.decode(answer, clean_up_tokenization_spaces=False))
    return text.rstrip("\ufffd") if text.strip("\ufffd").strip() else ""  # a character may be cut in its middle


def _prompt_text(tokenizer: Any, messages: list[Message]) -> str | None:
    """What the chat template makes of the messages, as an engine shows it; None where it depends on the day."""
    if "strftime_now" in str(tokenizer.chat_template):
        return None
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    adds_first = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_first else text
