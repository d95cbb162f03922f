"""What a published version was judged to be, read again from its files. Pure: manifest and evaluation.json in.

    manifest.json, evaluation.json → judgement → chat_app/against.py: may it become the champion without a reason?

The numbers and the guards of evaluation.json are judged anew by `verdict.py`; where that and the verdict in the
manifest differ, the worse one counts. An evaluation that is not there, or has other numbers, is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.guards import problems
from trainer.verdict import DECISIONS, decide
from trainer.versions import VersionManifest

COUNTS = ("wins", "ties", "losses")
_WORST_FIRST = ("reject", "keep", "promote")


def judgement(manifest: VersionManifest, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"decision": promote, keep, reject or None, "wins", "ties", "losses", "problems": sentences, "damage": why}.

    `evaluation`: evaluation.json of the version, None where it is not there or cannot be read. `decision` is None, and
    `damage` says why, where it cannot be known.
    """
    counted = dict.fromkeys(COUNTS, 0)
    try:
        counted = {key: _whole(manifest.evaluation, key) for key in COUNTS}
        decision = _known(manifest.verdict["decision"])
        if evaluation is None:
            raise ValueError("evaluation.json is missing or cannot be read")
        if any(key in evaluation and evaluation[key] != counted[key] for key in COUNTS):
            raise ValueError("evaluation.json has other numbers than the manifest")
        candidate, champion = manifest.version, str(manifest.evaluation.get("champion") or "the champion")
        against = [problem.sentence for problem in problems(evaluation, champion, candidate)]
        if "p_value" in evaluation:
            decision = min(decision, decide(evaluation, champion, candidate).decision, key=_WORST_FIRST.index)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        return {"decision": None, **counted, "problems": [], "damage": said}
    return {"decision": decision, **counted, "problems": against, "damage": None}


def _whole(evaluation: Mapping[str, Any], key: str) -> int:
    value = evaluation[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"its manifest says that {key} is {value!r}")
    return value


def _known(decision: Any) -> str:
    if decision not in DECISIONS:
        raise ValueError(f"its manifest says that the verdict is {decision!r}")
    return str(decision)
