"""A team's texts: found, described by their hashes, and refused where they are not what they were."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.errors import BadRunRequest, JobError
from trainer.texts import find_dialogues, find_texts, load_dialogues, load_texts


def test_text_and_markdown_are_found_and_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.md").write_text("# Second – ünïcode")
    (tmp_path / "deep" / "c.TXT").write_text("Third")
    (tmp_path / "a.txt").write_text("First")
    for name in (".hidden.txt", "table.csv"):
        (tmp_path / name).write_text("no")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    described = find_texts(tmp_path)
    assert list(described["files"]) == ["a.txt", "b.md", "deep/c.TXT"]
    assert load_texts(described) == ["First", "# Second – ünïcode", "Third"]
    assert find_texts(tmp_path) == described
    (tmp_path / "a.txt").rename(tmp_path / "d.txt")
    assert find_texts(tmp_path)["hash"] != described["hash"]


def test_a_text_that_changed_or_went_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First")
    described = find_texts(tmp_path)
    (tmp_path / "a.txt").write_text("Other")
    with pytest.raises(JobError, match="changed after the run was planned"):
        load_texts(described)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(JobError, match="cannot be read any more"):
        load_texts(described)


def test_without_text_no_run_is_planned(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadRunRequest, match="no text to learn from"):
            find_texts(folder)
    (tmp_path / "a.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(BadRunRequest, match=r"a\.txt is not UTF-8"):
        find_texts(tmp_path)


TOLD = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}], "prompt_id": "x"}


def test_dialogues_in_the_layout_of_ultrachat(tmp_path: Path) -> None:
    assert find_dialogues(tmp_path) is None
    (tmp_path / "a.jsonl").write_text(json.dumps(TOLD) + "\n\n" + json.dumps(TOLD) + "\n")
    pq.write_table(pa.Table.from_pylist([TOLD]), tmp_path / "b.parquet")
    described = find_dialogues(tmp_path)
    assert described is not None
    assert load_dialogues(described) == [tuple(TOLD["messages"])] * 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ('{"text": "no"}', r"a\.jsonl, row 1 has no `messages`"),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "role"),
        (json.dumps({"messages": TOLD["messages"][::-1]}), "no answer to a user's message"),
    ],
)
def test_a_bad_dialogue_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    described = find_dialogues(tmp_path)
    assert described is not None
    with pytest.raises(JobError, match=said):
        load_dialogues(described)
