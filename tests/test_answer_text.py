"""Tokens become text: whole characters, and nothing that a stop text may still swallow."""

from __future__ import annotations

import pytest

from chat_app.serving.answer_text import AnswerText


def from_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def pieces(said: bytes, *stops: str) -> list[str]:
    text = AnswerText(from_bytes, stops)
    shown = []
    for byte in said:
        shown.append(text.add(byte))
        if text.is_stopped:
            break
    return [*shown, text.rest()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    assert pieces("a€b".encode()) == ["a", "", "", "€", "b", ""]
    assert "".join(pieces("naïve 日本 🙂!".encode())) == "naïve 日本 🙂!"


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert pieces("ok €".encode()[:-1])[-1] == ""
    assert "".join(pieces("ok €".encode()[:-1])) == "ok "


def test_a_byte_that_is_no_character_does_not_hold_up_what_follows() -> None:
    assert "".join(pieces(b"a\xffb")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("said", "stops", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("twx",), "one two three"),
        ("aaab", ("aab",), "a"),
        ("ends with a beginning: <|e", ("<|end|>",), "ends with a beginning: <|e"),
        ("ein Wort – und", ("–",), "ein Wort "),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_not_shown(said: str, stops: tuple[str, ...], shown: str) -> None:
    assert "".join(pieces(said.encode(), *stops)) == shown


def test_what_may_become_a_stop_text_is_held_back() -> None:
    assert pieces(b"x<|y", "<|end|>") == ["x", "", "", "<|y", ""]
    assert pieces(b"x<|", "<|end|>") == ["x", "", "", "<|"]


def test_tokens_whose_text_depends_on_the_one_before() -> None:
    def spaced(tokens: list[int]) -> str:  # like sentencepiece: no space before the first word of a text
        return " ".join(f"w{token}" for token in tokens)

    text = AnswerText(spaced, ())
    assert [text.add(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]
