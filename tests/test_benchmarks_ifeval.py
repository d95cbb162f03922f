"""IFEval's instructions, checked by the package on answers whose truth is plain; what cannot be checked is named."""

from typing import Any

import pytest

pytest.importorskip("if_verifiable", reason="the extra `ifeval` is not installed")

from trainer.benchmarks.ifeval import check
from trainer.benchmarks.questions import Question

# langdetect and if-verifiable open files and use regular expressions as older Pythons let them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

NO_COMMA: tuple[str, dict[str, Any]] = ("punctuation:no_comma", {})
WORDS: tuple[str, dict[str, Any]] = ("length_constraints:number_words", {"relation": "at least", "num_words": 5})
SENTENCES: tuple[str, dict[str, Any]] = (
    "length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
)  # fmt: skip


def asked(*instructions: tuple[str, dict[str, Any]]) -> Question:
    return Question("1", "all", ("Write something.",), instructions=instructions)


def answer(*turns: str | None) -> dict[str, Any]:
    return {"question_id": "1", "turns": list(turns)}


def test_prompts_and_instructions_strict_and_loose() -> None:
    questions = [asked(NO_COMMA, WORDS), asked(NO_COMMA), asked(WORDS), asked(NO_COMMA)]
    answers = [
        answer("one two three four five"),  # follows both
        answer("Sure, here it is:\nno comma here"),  # follows it without its first line: loose
        answer("too short"),  # does not
        answer(""),  # an empty answer follows nothing
    ]
    found = check(questions, answers)
    assert (found["prompts"], found["instructions"]) == (4, 5)
    assert (found["prompt_strict"], found["prompt_loose"]) == (1 / 4, 2 / 4)
    assert (found["instruction_strict"], found["instruction_loose"]) == (2 / 5, 3 / 5)
    assert found["groups"] == {
        "punctuation": {"instructions": 3, "strict": 1 / 3, "loose": 2 / 3},
        "length_constraints": {"instructions": 2, "strict": 1 / 2, "loose": 1 / 2},
    }
    assert (found["not_checked"], found["prompts_not_checked"]) == ({}, 0)


def test_what_cannot_be_checked_is_named_and_in_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from if_verifiable.ifeval import instructions_util

    instructions_util._get_sentence_tokenizer.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])  # a machine without NLTK's data
    unknown: tuple[str, dict[str, Any]] = ("poetry:rhymes", {})
    questions = [asked(NO_COMMA, SENTENCES), asked(unknown), asked(NO_COMMA)]
    found = check(questions, [answer("One. Two."), answer("Roses"), answer("no comma")])
    assert found["not_checked"] == {"length_constraints:number_sentences": 1, "poetry:rhymes": 1}
    assert (found["prompts"], found["prompts_not_checked"], found["instructions"]) == (1, 2, 2)
    assert (found["prompt_strict"], found["instruction_strict"]) == (1.0, 1.0)


def test_the_language_of_an_answer_is_told_the_same_every_time() -> None:
    german: tuple[str, dict[str, Any]] = ("language:response_language", {"language": "de"})
    texts = ["Das ist ein ganz gewöhnlicher deutscher Satz.", "This is an ordinary English sentence."]
    for _ in range(3):
        found = check([asked(german)] * 2, [answer(text) for text in texts])
        assert found["instruction_strict"] == 0.5
