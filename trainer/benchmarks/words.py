"""The numbers of a benchmark → sentences for people, and the rows of its tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.benchmarks.scores import BIASED_SHARE, INCONSISTENT_SHARE
from trainer.scorer import CANDIDATE, CHAMPION

NO_JUDGE = (
    "No judge is configured: the answers stand in the report and nobody marked them. Set ZLOOP_JUDGE_URL and "
    "ZLOOP_JUDGE_MODEL (any OpenAI-compatible server) and ask again; the answers are kept."
)
Result = Mapping[str, Any]


def sentences(result: Result) -> list[str]:
    """What came out, each with its numbers; then what speaks against trusting it."""
    said: list[str] = []
    if result["ifeval"]:
        said += _of_ifeval(result)
    elif result["judge"] is None:
        said.append(NO_JUDGE)
    else:
        said += [*_of_marks(result), *_of_comparison(result), *_of_judge(result)]
    for side, count in result["unanswered"].items():
        if count:
            said.append(
                f"{_name(result, side)} had no room for {_counted(count, 'turn')}: too long for what the model reads. "
                "They are in no number."
            )
    return said


def tables(result: Result) -> list[dict[str, Any]]:
    """{"title", "head", "rows"}; the first cell of a row is its name, the others texts or numbers, None for nothing."""
    found = []
    if result["marks"]:
        sides = list(result["marks"])
        names = [_name(result, side) for side in sides]
        every = [result["marks"][side] for side in sides]
        rows = [["all", *(one["mean"] for one in every)]]
        turns, categories = every[0]["turns"], every[0]["categories"]
        if len(turns) > 1:
            rows += [[f"turn {turn}", *(one["turns"].get(turn) for one in every)] for turn in turns]
        if len(categories) > 1:
            rows += [[name, *(one["categories"].get(name) for one in every)] for name in categories]
        found.append({"title": "Mean mark, 1 to 10", "head": ["", *names], "rows": rows})
    if result["comparison"]:
        counted = result["comparison"]
        keys = ("wins", "ties", "losses")
        rows = [["all", *(counted[key] for key in keys)]]
        if len(counted["categories"]) > 1:
            rows += [[name, *(own[key] for key in keys)] for name, own in counted["categories"].items()]
        title = f"{result['version']} against {result['against']}, both orders"
        found.append({"title": title, "head": ["", *keys], "rows": rows})
    if result["ifeval"]:
        sides = list(result["ifeval"])
        every = [result["ifeval"][side] for side in sides]
        measures = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
        rows = [[key.replace("_", ", "), *(_share(one[key]) for one in every)] for key in measures]
        rows += [
            [f"{group}, strict", *(_share((one["groups"].get(group) or {}).get("strict")) for one in every)]
            for group in every[0]["groups"]
        ]
        found.append(
            {"title": "Instructions followed", "head": ["", *(_name(result, side) for side in sides)], "rows": rows}
        )
    return found


def _of_marks(result: Result) -> list[str]:
    said = []
    for side, one in (result["marks"] or {}).items():
        if one["mean"] is None:
            said.append(f"None of the {one['judged']} marks of {_name(result, side)} could be read.")
            continue
        turns = ", ".join(
            f"turn {turn}: {mean:.2f}"
            for turn, mean in one["turns"].items()
            if mean is not None and len(one["turns"]) > 1
        )
        read = one["judged"] - one["unreadable"]
        said.append(
            f"{_name(result, side)} gets {one['mean']:.2f} of 10 on {_counted(read, 'answer')}"
            + (f" ({turns})." if turns else ".")
        )
    if apart := result["marks_apart"]:
        found = "each by the same, so there is no interval."
        if apart["interval"] is not None:
            low, high = apart["interval"]
            found = f"95% interval {low:+.2f} to {high:+.2f}: {_decided(low, high, 0.0)}"
        said.append(
            f"{result['version']} is marked {apart['mean']:+.2f} against {result['against']} on "
            f"{_counted(apart['questions'], 'question')}, {found}"
        )
    return said


def _of_comparison(result: Result) -> list[str]:
    counted = result["comparison"]
    if not counted:
        return []
    # Turns of a question are alike, so questions are drawn too; few decided ones tell that bootstrap nothing.
    both = [counted["interval"], counted["interval_by_questions"] or counted["interval"]]
    low, high = min(one[0] for one in both), max(one[1] for one in both)
    rate = "–" if counted["win_rate_ties_half"] is None else f"{counted['win_rate_ties_half']:.0%}"
    said = [
        f"{result['version']} against {result['against']}: {_counted(counted['wins'], 'win')}, "
        f"{_counted(counted['ties'], 'tie')}, {_counted(counted['losses'], 'loss', 'losses')} on "
        f"{_counted(counted['pairs'], 'comparison')}, a win only where both orders agree "
        f"(win rate with ties as half: {rate})."
    ]
    if counted["win_rate"] is not None:
        said.append(
            f"Of those decided it wins {counted['win_rate']:.0%} (95% interval {low:.0%}–{high:.0%}): "
            + _decided(low, high, 0.5)
        )
    equal = counted["at_equal_length"]
    if equal is not None and equal["length_effect"] is None:
        said.append("The length of the answers tells who won: what it wins at equal length cannot be known.")
    elif equal is not None:
        low, high = equal["interval"]
        said.append(f"At equal length it wins {equal['win_rate']:.0%} ({low:.0%}–{high:.0%}).")
    elif counted["wins"] + counted["losses"]:
        said.append("Too little was decided on each side to say what it wins at equal length.")
    return said


def _of_judge(result: Result) -> list[str]:
    """What the judge is worth."""
    said = []
    unread = sum(one["unreadable"] for one in (result["marks"] or {}).values())
    judged = sum(one["judged"] for one in (result["marks"] or {}).values())
    bias = result["judge_bias"]
    if bias:
        unread, judged = unread + bias["unreadable"], judged + bias["judgements"]
    if unread:
        said.append(f"{unread} of {_counted(judged, 'judgement')} could not be read and are in no number.")
    if bias and bias["first_share"] is not None:
        said.append(
            f"The judge {result['judge']['model']} chose the first place in {bias['first_share']:.0%} of the "
            f"{_counted(bias['first'] + bias['second'], 'judgement')} that chose one."
        )
    if bias and bias["inconsistent_share"] is not None:
        said.append(
            f"Turned round, {bias['inconsistent']} of {_counted(bias['read_in_both_orders'], 'comparison')} "
            f"({bias['inconsistent_share']:.0%}) came out otherwise."
        )
        first = bias["first_share"] if bias["first_share"] is not None else 0.5
        if not 1 - BIASED_SHARE <= first <= BIASED_SHARE or bias["inconsistent_share"] > INCONSISTENT_SHARE:
            said.append("Where an answer stands moves this judge: take a stronger one before trusting its word.")
    return said


def _of_ifeval(result: Result) -> list[str]:
    said = []
    for side, one in result["ifeval"].items():
        said.append(
            f"{_name(result, side)} follows all instructions of {_share(one['prompt_strict'])} of "
            f"{_counted(one['prompts'], 'prompt')} (loose: {_share(one['prompt_loose'])}) and "
            f"{_share(one['instruction_strict'])} of {_counted(one['instructions'], 'instruction')} "
            f"(loose: {_share(one['instruction_loose'])})."
        )
    any_side = next(iter(result["ifeval"].values()))
    if any_side["not_checked"]:
        named = ", ".join(f"{name} ({count})" for name, count in any_side["not_checked"].items())
        said.append(
            f"Not checked: {named}, and so {_counted(any_side['prompts_not_checked'], 'prompt')} as a whole. Checkers "
            "of sentences and capitals need NLTK's data: `python -m nltk.downloader punkt_tab`."
        )
    return said


def _decided(low: float, high: float, level: float) -> str:
    if low > level:
        return "better by this judge."
    return "worse by this judge." if high < level else "no difference is shown."


def _name(result: Result, side: str) -> str:
    return str(result[{CANDIDATE: "version", CHAMPION: "against"}[side]])


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
