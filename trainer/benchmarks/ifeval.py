"""CHILD: IFEval's instructions that a program can verify (Zhou et al., 2023, arXiv:2311.07911), by `if-verifiable`.

The package (extra `ifeval`) holds the paper's checkers. `strict` takes the answer as it is, `loose` also without its
first or last line and without asterisks. A prompt counts where all its instructions are followed.

Two checkers (number of sentences, words in capitals) need NLTK's data `punkt_tab`, which is no package: without it they
are named in `not_checked` and are in no number, nor are the prompts that have one. An empty answer follows nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trainer.benchmarks.questions import Question
from trainer.errors import TrainingUnavailable

MODES = ("strict", "loose")


def check_ifeval_available() -> None:
    """Raises TrainingUnavailable where the package is missing. Imports nothing."""
    if find_spec("if_verifiable") is None:
        raise TrainingUnavailable(
            "The benchmark ifeval needs a package that is not installed: if-verifiable. "
            "Install it with `pip install 'zephyr-loop[ifeval]'`, then ask again."
        )


def check(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prompt-level and instruction-level accuracy, strict and loose, of one version's answers (in order).

    → {"prompts", "instructions", "prompt_strict", …, "groups": {group: {"instructions", "strict", "loose"}},
    "not_checked": {instruction: how often}, "prompts_not_checked"}; accuracies are None where nothing was checked.
    """
    prompts: list[dict[str, bool]] = []
    followed: list[tuple[str, dict[str, bool]]] = []
    not_checked: Counter[str] = Counter()
    without = 0
    for question, answer in zip(questions, answers, strict=True):
        text = answer["turns"][0] or ""
        found = [(name, _follows(question, name, arguments, text)) for name, arguments in question.instructions]
        not_checked.update(name for name, one in found if one is None)
        known = [(name, one) for name, one in found if one is not None]
        followed += known
        if len(known) < len(found) or not found:
            without += 1
        else:
            prompts.append({mode: all(one[mode] for _, one in known) for mode in MODES})
    groups = {}
    for group in dict.fromkeys(name.partition(":")[0] for name, _ in followed):
        own = [one for name, one in followed if name.partition(":")[0] == group]
        groups[group] = {"instructions": len(own), **{mode: _share(own, mode) for mode in MODES}}
    return {
        "prompts": len(prompts),
        "instructions": len(followed),
        **{f"prompt_{mode}": _share(prompts, mode) for mode in MODES},
        **{f"instruction_{mode}": _share([one for _, one in followed], mode) for mode in MODES},
        "groups": groups,
        "not_checked": dict(sorted(not_checked.items())),
        "prompts_not_checked": without,
    }


def _follows(question: Question, name: str, arguments: Mapping[str, Any], text: str) -> dict[str, bool] | None:
    """Whether the text follows one instruction; None where that cannot be checked here."""
    import langdetect
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    if name not in INSTRUCTION_DICT:
        return None
    langdetect.DetectorFactory.seed = 0  # else it draws
    try:
        results, _ = evaluate_instructions(text, [name], [dict(arguments)], question.turns[0], INSTRUCTION_DICT)
    except LookupError as error:
        if type(error) is LookupError:  # NLTK's data is not there; the other kinds are bugs
            return None
        raise
    if not results:  # the answer is empty
        return dict.fromkeys(MODES, False)
    return {"strict": bool(results[0].strict_pass), "loose": bool(results[0].loose_pass)}


def _share(rows: Sequence[Mapping[str, bool]], mode: str) -> float | None:
    return sum(row[mode] for row in rows) / len(rows) if rows else None
