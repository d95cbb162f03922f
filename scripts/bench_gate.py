"""How often is the live trial wrong, and how many votes does it need? Simulated voters → docs/benchmarks/gate.md.

    make bench-gate          (half a minute on one core)

The trials are those of `simulated_trials.py`, by the rules the product uses (`trainer/sequential.py`).
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from simulated_trials import (
    LIMIT,
    NEVER,
    Counts,
    by_position,
    by_size,
    check_against_the_product,
    exact,
    first_only,
    leaning,
    simulate,
)

from trainer.sequential import EDGES, Rules, bets

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "benchmarks" / "gate.md"
COLOURS = ("#4f46e5", "#0f766e", "#c2410c", "#a21caf", "#475569", "#b91c1c")
Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def quantile(found: Counts, level: float) -> str:
    """The votes by which this share of all trials has ended so."""
    at = np.quantile(found.astype(np.float64), level, method="inverted_cdf")
    return "more" if at >= NEVER / 2 else f"{at:,.0f}"


def wrong(found: Counts) -> str:
    """A share with its own 95% Clopper–Pearson interval."""
    hits, trials = int((found < NEVER).sum()), len(found)
    interval = binomtest(hits, trials).proportion_ci()
    return f"{hits / trials:.2%} ({interval.low:.2%}–{interval.high:.2%})"


def plot(path: Path, title: str, curves: dict[str, Curve], x_title: str, *, level: float, top: float = 1.0) -> None:
    """Lines as a small SVG; `level` is a dashed line across."""
    width, height, left, right, under, above = 720, 340, 56, 150, 44, 34
    reach = max(float(x.max()) for x, _ in curves.values())

    def at(x: float, y: float) -> str:
        return (
            f"{left + x / reach * (width - left - right):.1f},"
            f"{height - under - min(y, top) / top * (height - under - above):.1f}"
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="20" font-size="14" font-weight="600">{title}</text>',
    ]
    for step in range(6):
        y = top * step / 5
        (x0, y0), (x1, _) = (at(edge, y).split(",") for edge in (0, reach))
        parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}" stroke="#e2e8f0"/>')
        label = f"{y:.0%}"
        parts.append(f'<text x="{left - 6}" y="{float(y0) + 4}" text-anchor="end" fill="#475569">{label}</text>')
        x, y = (float(part) for part in at(reach * step / 5, 0).split(","))
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle" fill="#475569">{reach * step / 5:,.0f}</text>')
    (x0, y0), (x1, _) = (at(edge, level).split(",") for edge in (0, reach))
    parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}" stroke="#b91c1c" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{left}" y="{height - 8}" fill="#475569">{x_title}</text>')
    for index, (name, (xs, ys)) in enumerate(curves.items()):
        line = " ".join(at(float(x), float(y)) for x, y in zip(xs, ys, strict=True))
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{width - right + 10}" y="{above + 18 * (index + 1)}" fill="{colour}">{name}</text>')
    path.write_text("".join(parts) + "</svg>\n", encoding="utf-8")


def share_by(found: Counts, upto: int, points: int = 120) -> Curve:
    """The share of trials that ended so by each number of votes."""
    at = np.linspace(0, upto, points)
    return at, np.searchsorted(np.sort(found), at, side="right") / len(found)


def main() -> None:
    """Simulate, write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=20261123)
    asked = parser.parse_args()
    trials, seed, began = asked.trials, asked.seed, time.monotonic()
    rules = Rules()
    check_against_the_product(rules)
    found = {
        chance: simulate(chance, trials, seed + int(1000 * chance), rules) for chance in (0.5, 0.4, 0.55, 0.6, 0.65)
    }
    equal = found[0.5]
    # The same stream of an A/A trial that goes on after every other end, so that nothing but the bet holds it.
    alone = first_only(0.5, trials, seed + 1, rules)
    wrong_way = simulate(0.5, trials, seed + 2, Rules(weights=bets(70, 30)))

    lines = [
        "# The live trial: how often it is wrong, how many votes it needs",
        "",
        f"`make bench-gate`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}: "
        f"{trials:,} simulated trials a row, seed {seed}, a look after every vote, the rules of the product: alpha "
        f"{rules.alpha:.0%}, an improvement worth having {rules.worth:.0%}, a bet spread evenly over "
        f"{0.5 + EDGES[0]:.0%} to {0.5 + EDGES[-1]:.0%}. Votes are decided ones: with 15% ties, divide by 0.85.",
        "",
        "## Wrong promotions",
        "",
        "| challenger | called better, of all trials (95% interval of this simulation) | called worse | futile |",
        "|---|---|---|---|",
        *(
            f"| {name} | {wrong(one.better)} | {wrong(one.worse)} | {one.share(one.futile):.1%} |"
            for name, one in (
                ("equal: A/A, 50%", equal),
                ("A/A, half the bet led astray by an evaluation of 70 to 30", wrong_way),
                ("worse: 40%", found[0.4]),
            )
        ),
        "",
        f"Where an A/A trial is never stopped for any other reason, up to {LIMIT:,} votes: {wrong(alone)} are called "
        "better. Exactly, by "
        f"dynamic programming, up to 2,000 votes and with every way to end: {exact(0.5, rules, 2000)[-1]:.2%} at 50%, "
        f"{exact(0.4, rules, 2000)[-1]:.3%} at 40%. The promise is at most 5%, and at most 5% called worse.",
        "",
        "![A/A trials called better, by votes](gate-aa.svg)",
        "",
        "## Votes needed",
        "",
        "| true win rate | called better | 25% of trials by | median | 75% by | 90% by | exact median | asked for |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {chance:.0%} | {found[chance].share(found[chance].better):.1%} | "
            + " | ".join(quantile(found[chance].better, level) for level in (0.25, 0.5, 0.75, 0.9))
            + f" | **{(exact(chance, rules, 1000) >= 0.5).argmax() + 1}** | at most {asked_for} |"
            for chance, asked_for in ((0.55, 700), (0.6, 130), (0.65, 65))
        ),
        "",
        "The exact median is computed without simulation, by dynamic programming. Of all trials, those that ended "
        f"otherwise counted as “more”; the product's cap of {rules.max_votes:,} votes is taken off here ({LIMIT:,} are "
        "simulated). An A/A trial ends after "
        f"{quantile(equal.ended, 0.5)} votes (median), a 40% one after {quantile(found[0.4].ended, 0.5)}.",
        "",
        "![Trials called better, by votes](gate-votes.svg)",
        "",
        *known_besides(trials, seed, rules),
        "## How it was computed",
        "",
        "For every number of votes the fewest wins that end a trial are found by bisection on the product's own bet, "
        "and a simulated trial ends where its wins meet that line; before anything else the script checks on whole "
        "trials that `look`, which the product asks after every vote, ends them at the same vote in the same way. "
        f"{time.monotonic() - began:.0f} s on one core.",
        "",
    ]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    folder = OUT.parent
    plot(folder / "gate-aa.svg", f"{trials:,} A/A trials called better", {
        "never stopped": share_by(alone, LIMIT), "as in the product": share_by(equal.better, LIMIT),
        "40% challenger": share_by(found[0.4].better, LIMIT),
    }, "votes, with a look after each; dashed: the promise, 5%", level=0.05, top=0.1)  # fmt: skip
    plot(folder / "gate-votes.svg", "Trials called better", {
        f"true {chance:.0%}": share_by(found[chance].better, 1500) for chance in (0.65, 0.6, 0.55, 0.5)
    }, "votes; dashed: half of the trials", level=0.5)  # fmt: skip
    print(f"{OUT.relative_to(ROOT)} ({time.monotonic() - began:.0f} s)")


def known_besides(trials: int, seed: int, rules: Rules) -> list[str]:
    """What the evaluation, the place and the size of a bet would do."""
    some = min(trials, 1000)
    rows = []
    for chance in (0.55, 0.6, 0.65):
        even = simulate(chance, trials, seed + 11, rules).better
        of = [leaning(chance, pairs, trials, seed + 12) for pairs in (100, 400)]
        wrong_way = simulate(chance, trials, seed + 13, Rules(weights=bets(35, 65))).better
        medians = (f"{quantile(one, 0.5)} / {quantile(one, 0.75)}" for one in (even, *of, wrong_way))
        rows.append(f"| {chance:.0%} | {' | '.join(medians)} |")
    places = []
    for pull in (0.05, 0.1, 0.2):
        plain, taken = (by_position(pull, 0.6, some, seed + 21, adjusted=adjusted) for adjusted in (False, True))
        equal = by_position(pull, 0.5, some, seed + 22, adjusted=True)
        places.append(f"| {0.5 + pull:.0%} | {quantile(plain, 0.5)} | {quantile(taken, 0.5)} | {wrong(equal)} |")
    sized = by_size(some, seed + 31)
    return [
        "## What is known besides the vote",
        "",
        "**The evaluation** (the model's margins on held-out picks) is known before the first vote, so half of the bet "
        "may lean on it (`sequential.bets`): the error stays what it is, whatever the evaluation is worth (second row "
        "of the first table). Used where the evaluation was against this champion. It saves most "
        "where the difference is small, and costs some where it misleads. Votes by which half / 75% of "
        "the trials are called better:",
        "",
        "| true win rate | even bet | leaning on 100 pairs with that win rate | on 400 pairs | misled by 35 to 65 |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "**The place** of an answer is a fair coin, so the pull of the first place can be taken out of every vote "
        "without touching the mean (a control variate). What that saves at a true 60%, and how often it is "
        "wrong at 50%:",
        "",
        "| the first place wins, between equals | even bet | place taken out | A/A called better |",
        "|---|---|---|---|",
        *places,
        "",
        f"({some:,} trials of up to 1,500 votes.) Worth something only where people pick by position; and it leans on "
        "nobody leaving a pair without a pick more often when the challenger stands first. Not used: the order is "
        "random, and the strengths (`trainer/strength.py`) take the place out with an interval.",
        "",
        "**The size of the bet by prompt, length or margin** is not used: it is not valid for what is promised. “No "
        "better on average” allows a challenger that wins where its margin is large and loses where it is small. "
        f"One that wins 65% of the half with large margins and 35% of the rest – 50% in all – is called better in "
        f"{wrong(sized)} of {some:,} trials of up to 1,000 votes where bets are six times as large on large margins. "
        "A predictor whose correlation with the vote is r could save about a share r² of the votes, if its own mean "
        "were known from many pairs nobody votes on (prediction-powered inference, Angelopoulos et al., 2023): with r "
        "= 0.3 that is 9%, paid for with answers written for nobody. Not done.",
        "",
    ]


if __name__ == "__main__":
    main()
