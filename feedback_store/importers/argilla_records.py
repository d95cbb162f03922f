"""Argilla's records: fields with a prompt and answers, and what people said to questions about them.

Four layouts are read. Argilla 2 (repository argilla-io/argilla, argilla/src/argilla/records/_io/_generic.py at commit
02e0d37, _json.py, and records/_resource.py at commit 0991739):

* ``records.to_json``, ``to_list``: ``{id, fields: {…}, responses: {question: [{value, user_id}]},
  suggestions: {question: {value, score, agent}}, metadata, vectors}``; it does not say which responses are submitted;
* ``to_list(flatten=True)``, ``to_datasets``: the fields as columns, ``question.responses`` with ``….users`` and
  ``….status`` beside it, ``question.suggestion``.

Argilla 1 (its FeedbackDataset, the same project before 2.0; seen in its tests):

* ``{fields: {…}, responses: [{user_id, status, values: {question: {value}}}], suggestions: [{question_name, value}]}``;
* ``format_as("datasets")``: the fields as columns, ``question`` with a list of ``{user_id, value, status}``,
  ``question-suggestion``.

The prompt is the field ``prompt``, ``instruction``, ``question`` or alike, after ``context`` if there is one; the
answers are ``response1``, ``response_2``, ``completion-1``, ``chosen`` … (the first as in Argilla's own template
``for_preference_modeling``). Of what one person said, the first of these counts: a ranking of the answers; a label that
names one ("response-1", "2") or says tie; ratings in questions with the answers' numbers (``rating_1``; several aspects
are averaged). The best answer against the worst makes the pair. For a single answer the labels good and bad make a
labelled one; a rating does not, for a record does not tell its scale. Draft and discarded responses are left out.
Suggestions count only where nobody responded; they are a model's and have no rater. Argilla 2 drops the ties of a
ranking when it exports. A rater is Argilla's user id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from feedback_store.importers.pairs import Choices, Item, Skip, read_label, read_pair, read_rater
from feedback_store.importers.sources import Row

NAME = "argilla_records"
WHY = "its rows are Argilla records: fields with responses or suggestions to questions"

_PROMPTS = ("prompt", "instruction", "input", "question", "query", "chat", "conversation", "messages")
_ANSWER = re.compile(
    r"(?:response|completion|answer|generation|output|reply|option)(?:[-_ ]?\d+|[-_ ][a-d])?|chosen|rejected"
)
_MARK = re.compile(r"(?<![a-z0-9])[a-d]$|\d+(?!.*\d)")
_TIES = {"tie", "equal", "same", "both", "neither", "draw"}
_GOOD_OR_BAD = {"good": True, "thumbs_up": True, "up": True, "bad": False, "thumbs_down": False, "down": False}


class _Value(NamedTuple):
    question: str
    value: Any
    rater: str | None = None
    status: object = None


def matches(row: Row) -> bool:
    """Whether a row is a record in one of the four layouts."""
    if isinstance(row.get("fields"), dict):
        return "responses" in row or "suggestions" in row
    return any(name.endswith((".responses", ".suggestion")) or f"{name}-suggestion" in row for name in row)


def read(row: Row, _choices: Choices) -> Item | Sequence[Item]:
    """One pair or labelled answer for each person who responded."""
    fields = row["fields"] if isinstance(row.get("fields"), dict) else row
    answers = {name: answer for name, answer in fields.items() if _ANSWER.fullmatch(name.lower()) and _is_said(answer)}
    prompt = _prompt(fields)
    if prompt is None or not answers:
        return Skip("malformed")
    by_rater: dict[str | None, dict[str, Any]] = {}
    for question, value, rater, status in list(_responses(row)) or _suggestions(row):
        if status in (None, "submitted") and value is not None:
            by_rater.setdefault(rater, {})[question] = value
    judge = _label if len(answers) == 1 else _pair
    return [judge(prompt, answers, values, rater) for rater, values in by_rater.items()] or Skip("unlabelled")


def _is_said(answer: object) -> bool:
    # A flattened record has the questions as columns too: lists of values and not of messages.
    if isinstance(answer, list):
        return bool(answer) and all(isinstance(message, dict) and "content" in message for message in answer)
    return isinstance(answer, str) and bool(answer.strip())


def _prompt(fields: Mapping[str, Any]) -> Any:
    prompt = next((fields[name] for name in _PROMPTS if _is_said(fields.get(name))), None)
    context = fields.get("context")
    if isinstance(prompt, str) and isinstance(context, str) and context.strip():
        return f"{context}\n\n{prompt}"
    return prompt


def _responses(row: Row) -> Iterator[_Value]:
    """What people said, in any of the layouts."""
    kept = row.get("responses")
    if isinstance(row.get("fields"), dict):
        if isinstance(kept, dict):
            for question, responses in kept.items():
                yield from _listed(question, responses)
        for response in _objects(kept):
            for question, value in _object(response.get("values")).items():
                yield from _listed(question, [{**response, **_object(value)}])
        return
    for name, column in row.items():
        if name.endswith(".responses"):
            columns = {"value": column, "user_id": row.get(f"{name}.users"), "status": row.get(f"{name}.status")}
            yield from _listed(name.removesuffix(".responses"), columns)
        elif f"{name}-suggestion" in row:
            yield from _listed(name, column)


def _listed(question: str, responses: Any) -> Iterator[_Value]:
    """``responses`` is a list of objects, or an object of lists (as data sets keep them)."""
    if isinstance(responses, dict):
        columns = [_list(responses.get(name)) for name in ("value", "user_id", "status")]
        names = ("value", "user_id", "status")
        responses = [dict(zip(names, one, strict=True)) for one in zip_longest(*columns)]
    for response in _objects(responses):
        yield _Value(question, response.get("value"), read_rater(response.get("user_id")), response.get("status"))


def _suggestions(row: Row) -> Iterator[_Value]:
    kept = row.get("suggestions")
    if isinstance(row.get("fields"), dict):
        if isinstance(kept, dict):
            kept = [{**_object(one), "question_name": question} for question, one in kept.items()]
        for one in _objects(kept):
            yield _Value(str(one.get("question_name")), one.get("value"))
        return
    for name, value in row.items():
        if name.endswith((".suggestion", "-suggestion")):
            yield _Value(name[: -len(".suggestion")], value)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _label(prompt: Any, answers: Mapping[str, Any], values: Mapping[str, Any], rater: str | None) -> Item:
    words = (value.strip().lower().replace(" ", "_") for value in values.values() if isinstance(value, str))
    label = next((_GOOD_OR_BAD[word] for word in words if word in _GOOD_OR_BAD), None)
    return read_label(prompt, next(iter(answers.values())), label, rater=rater)


def _pair(prompt: Any, answers: Mapping[str, Any], values: Mapping[str, Any], rater: str | None) -> Item:
    scores = _ranked(answers, values) or _named(answers, values) or _rated(answers, values)
    if scores is None or len(scores) < 2:
        return Skip("unlabelled")
    best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    if scores[best] == scores[worst]:
        return Skip("tie")
    return read_pair(prompt, answers[best], answers[worst], rater=rater)


def _ranked(answers: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float] | None:
    """Scores from a ranking: a list of names, the best first, or of ``{rank, value}``."""
    for value in values.values():
        if not isinstance(value, list):
            continue
        scores: dict[str, float] = {}
        for place, entry in enumerate(value, start=1):
            name, rank = (entry.get("value"), entry.get("rank")) if isinstance(entry, dict) else (entry, None)
            answer = _answer_named(answers, name)
            if answer is not None:
                scores[answer] = -float(rank if isinstance(rank, int | float) else place)
        if len(scores) > 1:
            return scores
    return None


def _named(answers: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float] | None:
    """Scores from a label that names the better answer, or says that none is."""
    for value in values.values():
        if isinstance(value, str):
            answer = _answer_named(answers, value)
            if answer is not None or value.strip().lower() in _TIES:
                return {name: float(name == answer) for name in answers}
    return None


def _rated(answers: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float] | None:
    """Scores from ratings: the mean of all questions with the number of an answer."""
    scores: dict[str, float] = {}
    for answer in answers:
        ratings = [
            value
            for question, value in values.items()
            if isinstance(value, int | float) and _mark(question) is not None and _mark(question) == _mark(answer)
        ]
        if ratings:
            scores[answer] = sum(ratings) / len(ratings)
    return scores or None


def _answer_named(answers: Mapping[str, Any], name: object) -> str | None:
    """The answer a value names: ``response-1``, ``Response 1`` and ``1`` are all ``response_1``."""
    if not isinstance(name, str | int):
        return None
    written = _plain(str(name))
    return next((answer for answer in answers if written in (_plain(answer), _mark(answer))), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _mark(name: str) -> str | None:
    """What tells the answers apart in a name: its last number, or a letter at its end."""
    found = _MARK.search(name.lower())
    return found.group() if found else None
