"""Every prompt of every file in the folder is found, and a file that cannot be read stops a snapshot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback_store.errors import BadImport, InvalidRecord
from feedback_store.evaluation_prompts import load_evaluation_prompts

MT_BENCH = Path(__file__).parent.parent.parent / "shared" / "data" / "eval" / "mt_bench" / "question.jsonl"


def test_no_folder_no_prompts(tmp_path: Path) -> None:
    assert load_evaluation_prompts(tmp_path / "none") == []


def test_prompts_are_read_from_text_and_rows_of_every_layout(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Why is the sky blue?\n\n  Cook rice.  \n")
    rows = [
        {"prompt": "A prompt"},
        {"instruction": "An instruction"},
        {"question": "A question"},
        {"turns": ["First turn", "Second turn"]},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A dialogue"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "table.csv").write_text('prompt\n"A cell"\n')
    (tmp_path / ".hidden.txt").write_text("not this")
    dialogues = ["First turn", "A dialogue"]
    others = ["Why is the sky blue?", "Cook rice.", "A prompt", "An instruction", "A question", "A cell"]
    assert load_evaluation_prompts(tmp_path) == sorted([*dialogues, *others])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "fine"}\n{"answer": "no prompt"}\n')
    with pytest.raises(InvalidRecord, match=r"rows\.jsonl, row 2"):
        load_evaluation_prompts(tmp_path)
    path.write_text("{broken")
    with pytest.raises(BadImport, match=r"rows\.jsonl"):
        load_evaluation_prompts(tmp_path)
    path.unlink()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadImport, match=r"latin\.txt.*UTF-8"):
        load_evaluation_prompts(tmp_path)


@pytest.mark.skipif(not MT_BENCH.exists(), reason="needs ../shared/data/eval/mt_bench/question.jsonl")
def test_mt_bench_gives_its_eighty_first_turns(tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_bytes(MT_BENCH.read_bytes())
    assert len(load_evaluation_prompts(tmp_path)) == 80
