"""hh-rlhf dialogues: turns out of one text, and what breaks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_importers_layouts import HH, take

from feedback_store.importers.hh_rlhf import matches, read
from feedback_store.importers.pairs import Choices, ImportedPair, Skip

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "hh_rlhf" / "helpful-base.test.jsonl.gz"
BEFORE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nStill here.\n\nHuman: Why?\n\nAssistant:"


def test_earlier_turns_belong_to_the_prompt_and_an_answer_may_have_paragraphs() -> None:
    pair = read({"chosen": f"{BEFORE} Because.\n\nNote: truly.", "rejected": f"{BEFORE} No. "}, Choices())
    assert pair == ImportedPair(
        (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello.\n\nStill here."},
            {"role": "user", "content": "Why?"},
        ),
        "Because.\n\nNote: truly.",
        "No.",
    )


def test_a_copy_with_the_dialogue_in_the_prompt_is_the_same_pair() -> None:
    copy = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."}
    assert matches(copy)
    assert read(copy, Choices()) == read(HH, Choices())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": "\n\nHuman: Why not?\n\nAssistant: No."}, "malformed"),
        ({"rejected": "\n\nHuman: Why?\n\nAssistant: No.\n\nAssistant: Never."}, "malformed"),
        ({"rejected": "\n\nHuman: Why?\n\nHuman: Please.\n\nAssistant: No."}, "malformed"),
        ({"rejected": "\n\nHuman: Why?"}, "malformed"),
        ({"rejected": "\n\nAssistant: No."}, "malformed"),
        ({"rejected": "Why? No."}, "malformed"),
        ({"rejected": None}, "malformed"),
        ({"rejected": "\n\nHuman: Why?\n\nAssistant:"}, "empty"),
        ({"rejected": "\n\nHuman: Why?\n\nAssistant:  Because. "}, "identical"),
        ({"rejected": f"\n\nHuman: Why?\n\nAssistant: {'x' * 24_001}"}, "over_long"),
    ],
)
def test_a_row_that_cannot_teach_is_skipped_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert read(HH | changes, Choices()) == Skip(reason)


@pytest.mark.skipif(not REAL.is_file(), reason="needs the folder ../shared/data with real preferences")
def test_real_dialogues_are_counted_right() -> None:
    rows, opened = take(str(REAL))
    assert (opened.format, opened.rows_read, len(rows)) == ("hh_rlhf", 2354, 2333)
    assert dict(opened.skipped) == {"malformed": 15, "empty": 4, "identical": 2}
    assert opened.examples == {
        "malformed": [169, 355, 356, 568, 744],
        "empty": [121, 741, 1215, 2064],
        "identical": [722, 2169],
    }
    assert not any("\n\nHuman:" in message["content"] for row in rows for message in row.prompt)
