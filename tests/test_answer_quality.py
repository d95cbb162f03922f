"""What is seen of an answer without a judge: each measure on texts whose measure is known."""

import pytest

from trainer.answer_quality import Answer, changes_language, describe, is_empty, is_refusal, language, repetition

ENGLISH = "The weather will be fine in the afternoon, but take a coat for the evening."
GERMAN = "Am Nachmittag wird das Wetter schön, aber für den Abend sollte man einen Mantel mitnehmen."


def answer(text: str, question: str = ENGLISH, *, finished: bool = True) -> Answer:
    return Answer(question, text, tokens=len(text.split()), finished=finished)


@pytest.mark.parametrize(
    ("text", "measure"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five six", 0.0),
        ("a b c d a b c d", 0.2),  # five runs, four of them different
        ("no no no no no no no", 0.75),  # four runs, all the same
        ("Yes it is. yes IT is. Yes it is. Yes it is.", 6 / 9),
    ],
)
def test_repetition_is_the_part_of_runs_that_stood_there_before(text: str, measure: float) -> None:
    assert repetition(text) == pytest.approx(measure)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I am so sorry but I am unable to do this.", True),
        ("I cannot write that.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("Unfortunately, I won't do that.", True),
        ("Sorry to hear that! Rest, and drink water.", False),
        ("I can recommend three books.", False),
        ("You cannot divide by zero.", False),
        ("Unfortunately the harvest failed. People can't eat stones.", False),
        ("", False),
    ],
)
def test_a_refusal_is_told_by_its_beginning(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_an_answer_without_letters_or_digits_is_empty() -> None:
    assert all(is_empty(text) for text in ("", " \n", "...", "…!?"))
    assert not any(is_empty(text) for text in ("4", "é", "天"))


def test_a_language_is_told_only_where_it_is_sure() -> None:
    assert language(ENGLISH) == "en"
    assert language(GERMAN) == "de"
    assert language("Paris.") is None
    assert language("```\n" + ENGLISH * 3 + "\n```") is None


def test_another_language_than_the_question_s_counts_and_a_short_question_never_does() -> None:
    assert changes_language(answer(GERMAN))
    assert not changes_language(answer(ENGLISH))
    assert not changes_language(answer(GERMAN, question="Wetter?"))


def test_a_description_counts_each_kind() -> None:
    described = describe(
        [answer(""), answer("I can't do that."), answer(GERMAN), answer("a b c d a b c d", finished=False)]
    )
    assert described.as_dict() == {
        "answers": 4,
        "words": 6.0,
        "repetition": pytest.approx(0.05),
        "empty": 1,
        "unfinished": 1,
        "refusals": 1,
        "other_language": 1,
    }
    with pytest.raises(ValueError, match="at least one"):
        describe([])
