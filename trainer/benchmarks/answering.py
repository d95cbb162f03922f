"""CHILD: the answers of one or two versions to the questions of a benchmark → answers.json; IFEval's are checked.

    benchmark.json → every turn in batches, greedy, the next turn going on from the answer → answers.json

Started by `trainer.evaluate`, which finds benchmark.json in its directory. Each answer is kept when it is written
(`kept.py`), so a benchmark that broke off goes on. Not covered: sampling, system prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from feedback_store.records import Message
from trainer.benchmarks.ifeval import check
from trainer.benchmarks.kept import Kept, key_of
from trainer.benchmarks.questions import IFEVAL, Question
from trainer.generation import greedy_answers
from trainer.scorer import CANDIDATE, CHAMPION, Scorer
from trainer.tokens import prompt_length

BATCH = 8
LEAST_TOKENS = 16  # of room for an answer; a dialogue that leaves less is not answered


def answer_benchmark(run_dir: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """{"answers": {side: [{"question_id", "turns": [text or None]}]}, "ifeval": {side: …} or None}.

    None stands for a turn for which the model has no room. `asked` is benchmark.json, written by `bench.py`.
    """
    questions = [Question.from_dict(one) for one in asked["questions"]]
    sides = [side for side in (CANDIDATE, CHAMPION) if side in asked]
    keepers = {side: Kept(Path(asked[side]["kept"])) for side in sides}
    scorer: Scorer | None = None
    answers: dict[str, list[dict[str, Any]]] = {}
    report = _reporter(run_dir, sum(len(one.turns) for one in questions) * len(sides))
    for side in sides:
        dialogues = [_Dialogue(question, keepers[side], asked["max_tokens"]) for question in questions]
        if any(not one.is_done for one in dialogues):
            scorer = scorer or Scorer(asked)
            with scorer.model(side) as model:
                _answer_all(model, scorer.tokenizer, dialogues, asked["max_tokens"], report)
        answers[side] = [{"question_id": one.question.question_id, "turns": one.answers} for one in dialogues]
    checked = {side: check(questions, answers[side]) for side in sides} if asked["benchmark"] == IFEVAL else None
    return {"answers": answers, "ifeval": checked}


class _Dialogue:
    """A question and the answers so far, those of earlier times included."""

    def __init__(self, question: Question, kept: Kept, max_tokens: int) -> None:
        self.question = question
        self.answers: list[str | None] = []
        self._kept = kept
        self._max_tokens = max_tokens
        self._go_on()

    @property
    def is_done(self) -> bool:
        return len(self.answers) == len(self.question.turns)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The dialogue up to the turn that is to be answered."""
        said: list[Message] = []
        for turn, answer in zip(self.question.turns, self.answers, strict=False):
            said += [Message(role="user", content=turn), Message(role="assistant", content=answer or "")]
        return (*said, Message(role="user", content=self.question.turns[len(self.answers)]))

    def take(self, answer: str) -> None:
        self._kept.add(self._key(), answer)
        self._go_on()

    def give_up(self) -> None:
        """There is no room for this turn, and so for none after it."""
        self.answers += [None] * (len(self.question.turns) - len(self.answers))

    def _go_on(self) -> None:
        while not self.is_done and (known := self._kept.get(self._key())) is not None:
            self.answers.append(known)

    def _key(self) -> str:
        return key_of(self._max_tokens, [dict(message) for message in self.prompt])


def _answer_all(
    model: Any, tokenizer: Any, dialogues: Sequence[_Dialogue], max_tokens: int, report: Callable[[int], None]
) -> None:
    """Turn by turn; within a turn in batches of prompts of similar length."""
    room = int(getattr(model.config, "max_position_embeddings", None) or 1_000_000)
    while open_ones := [one for one in dialogues if not one.is_done]:
        lengths = {id(one): prompt_length(tokenizer, one.prompt) for one in open_ones}
        for one in open_ones:
            if room - lengths[id(one)] < min(LEAST_TOKENS, max_tokens):
                one.give_up()
        ready = sorted((one for one in open_ones if not one.is_done), key=lambda one: lengths[id(one)])
        for start in range(0, len(ready), BATCH):
            batch = ready[start : start + BATCH]
            longest = max(lengths[id(one)] for one in batch)
            written = greedy_answers(
                model,
                tokenizer,
                [one.prompt for one in batch],
                max_tokens=min(max_tokens, room - longest),
                prompt_tokens=longest,
            )
            for one, answer in zip(batch, written, strict=True):
                one.take(answer.text)
            report(sum(len(one.answers) for one in dialogues))


def _reporter(run_dir: Path, total: int) -> Callable[[int], None]:
    since = time.time()

    def report(done: int) -> None:
        progress = {"stage": "evaluating", "since": since, "evaluation": {"done": done, "total": total}}
        write_json(run_dir / "progress.json", {**progress, "time": time.time()})

    return report
