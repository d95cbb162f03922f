"""Raters read that it mattered: what they taught a version, and how it does on what was held back."""

from pathlib import Path

from test_versions import VERDICT, trained_run

from feedback_store.durable import write_json
from trainer.credits import Credit, credits_of
from trainer.versions import Versions


def test_a_credit_has_the_rows_taught_and_the_pairs_held_back(tmp_path: Path) -> None:
    versions, snapshots = Versions(tmp_path / "versions"), tmp_path / "snapshots"
    run = trained_run(tmp_path)
    evaluation = run.evaluation
    assert evaluation is not None
    ann = {"rater": "ann", "wins": 6, "ties": 1, "losses": 2}
    write_json(run.directory / "evaluation.json", {**evaluation, "raters": [ann, {**ann, "rater": "carl"}]})
    versions.publish(run, "v1", VERDICT)
    assert credits_of("v1", versions, snapshots) == {}  # its snapshot is gone
    (snapshots / "abc").mkdir(parents=True)
    write_json(snapshots / "abc" / "manifest.json", {"parts": {"train": {"raters": {"ann": 14, "bob": 1}}}})
    found = credits_of("v1", versions, snapshots)
    assert found == {"ann": Credit("v1", "v0", 14, 6, 1, 2), "bob": Credit("v1", "v0", 1, 0, 0, 0)}
    assert found["ann"].sentence == (
        "v1 learned from 14 judgements of yours; on 9 held back from it, it agrees with you more than v0 on 6, "
        "less on 2."
    )
    assert found["bob"].sentence == "v1 learned from 1 judgement of yours."
