"""Promote a faulty version, see it taken back, fifty times; and how often a good one is → docs/benchmarks/baking.md.

    make soak-baking
    python scripts/soak_baking.py --cycles 7 --trials 50       a short one, which prints and writes nothing

The cycles are those of `tests/baking_cycles.py`: the product over HTTP under streams, the scripted engine at fault. The
trials are simulated answers put to the verdict (`chat_app/baking.py`) after each of 50, as the watch does.
"""

import argparse
import asyncio
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from baking_cycles import KINDS, Cycle, Heard, cycles  # noqa: E402

from chat_app.baking import Answered, decide  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "baking.md"
WATCHED = 50


@dataclass(frozen=True)
class World:
    """How the version before answers: shares of trouble, and the spread of lengths and times (log-normal)."""

    failed: float = 0.01
    empty: float = 0.01
    repetitive: float = 0.03
    rated: float = 0.2
    down: float = 0.3
    log_s: float = 0.6
    log_length: float = 0.8
    slower: float = 1.0
    longer: float = 1.0

    def answer(self, dice: random.Random) -> Answered:
        return Answered(
            "",
            failed=dice.random() < self.failed,
            characters=0
            if dice.random() < self.empty
            else round(self.longer * dice.lognormvariate(6, self.log_length)),
            repetitive=dice.random() < self.repetitive,
            first_token_s=self.slower * dice.lognormvariate(-0.7, self.log_s),
            rating=("down" if dice.random() < self.down else "up") if dice.random() < self.rated else None,
        )


USUAL = World()
ROUGH = World(failed=0.05, empty=0.03, repetitive=0.1, log_s=1.0, log_length=1.0, down=0.4)
WORSE: tuple[tuple[str, World], ...] = (
    ("10% of the answers fail", replace(USUAL, failed=0.1)),
    ("20% of the answers fail", replace(USUAL, failed=0.2)),
    ("50% of the answers fail", replace(USUAL, failed=0.5)),
    ("20% are empty", replace(USUAL, empty=0.2)),
    ("30% go round in circles", replace(USUAL, repetitive=0.3)),
    ("all are twice as long", replace(USUAL, longer=2.0)),
    ("all are four times as long", replace(USUAL, longer=4.0)),
    ("first tokens come four times later", replace(USUAL, slower=4.0)),
    ("90% of those rated are rated down (of 20% rated)", replace(USUAL, down=0.9)),
)


def trial(world: World, worse: World, answers_before: int, dice: random.Random) -> int | None:
    """After how many answers a version of `worse` is taken back; None: it is kept."""
    before = [world.answer(dice) for _ in range(answers_before)]
    seen: list[Answered] = []
    for _ in range(WATCHED):
        seen.append(worse.answer(dice))
        if decide(seen, before, "v0").go_back:
            return len(seen)
    return None


def simulated(trials: int) -> Iterator[str]:
    """The rows of the table: wrong alarms first, then what is really worse."""
    rows: list[tuple[str, Callable[[random.Random], int | None]]] = [
        ("no worse; 200 answers before", lambda dice: trial(USUAL, USUAL, 200, dice)),
        ("no worse; 20 answers before", lambda dice: trial(USUAL, USUAL, 20, dice)),
        ("no worse; none before", lambda dice: trial(USUAL, USUAL, 0, dice)),
        ("no worse, in a rough world; 200 answers before", lambda dice: trial(ROUGH, ROUGH, 200, dice)),
    ]
    for what, world in WORSE:
        rows.append((f"{what}; 200 answers before", lambda dice, world=world: trial(USUAL, world, 200, dice)))
    for what, run in rows:
        dice = random.Random(what)
        ends = [run(dice) for _ in range(trials)]
        back = [end for end in ends if end is not None]
        after = f"{statistics.median(back):.0f}" if back else ""
        yield f"| {what} | {len(back)} of {trials} ({len(back) / trials:.1%}) | {after} |"


def row(kind: str, done: list[Cycle]) -> str:
    """One line of the table of cycles."""
    return (
        f"| {kind} | {sum(one.back for one in done)} of {len(done)} "
        f"| {statistics.median(one.requests for one in done):.0f} ({max(one.requests for one in done)}) "
        f"| {statistics.median(one.begun for one in done):.0f} ({max(one.begun for one in done)}) "
        f"| {statistics.median(one.seconds for one in done):.2f} ({max(one.seconds for one in done):.2f}) "
        f"| {sum(one.rescued for one in done)} | {sum(one.broken for one in done)} |"
    )


def report(done: list[Cycle], heard: Heard, streams: int, table: list[str]) -> str:
    """The page."""
    kinds = dict.fromkeys(one.fault for one in done)
    rows = [row(kind.name.lower().replace("_", " "), [one for one in done if one.fault is kind]) for kind in kinds]
    in_time = sum(one.back and one.requests <= 50 and one.seconds <= 60 for one in done)
    examples = "\n".join(f"- {next(one.reason for one in done if one.fault is kind)}" for kind in kinds)
    answers = sum(heard.whole.values()) + sum(heard.broken.values()) + len(heard.wrong)
    return f"""# A faulty champion is taken back

`make soak-baking`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}): the product over HTTP,
{streams} clients streaming all the time, the scripted engine going wrong on demand. {len(done)} versions were promoted
one after the other, each with a fault. Clients, server and store share the cores.

**Back in time (within 50 answers and 60 s): {in_time} of {len(done)}. Answers that failed because of a swap:
{len(heard.wrong)} of {answers}.** Each whole answer was compared with what its version says.

| fault | back | answers judged | answers begun | seconds | rescued | broken by the version |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
{row("**all**", done)}

Medians, and the most in brackets. *Seconds* are from the order to promote until the version before answers again, the
start of the engine included. *Rescued*: the version failed or was empty before its first word, and the person got the
answer of the version before instead. *Broken by the version*: its answer broke after its first word, when nothing could
be done any more; these are its own fault and are not counted as failed by the swap. What the admin page says:

{examples}

## How often is the verdict right?

Simulated answers ({WATCHED} a promotion, a look after each), put to the same function. The usual world: 1% fail, 1% are
empty, 3% go round in circles, 20% are rated and 30% of those down; lengths and first-token times are log-normal (σ 0.8
and 0.6). The rough world: 5%, 3%, 10%, 40%; σ 1.0.

| the new version | taken back within {WATCHED} answers | after, median |
|---|---|---|
{chr(10).join(table)}

Answers are taken as independent here. Real trouble comes in bursts: an outage of the machine or of a model server that
begins within the watch looks like the new version's fault, and it is taken back.
"""


def main() -> None:
    """Run; write the report after a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--trials", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        kinds = list(islice(cycle(KINDS), options.cycles))
        done, heard = asyncio.run(cycles(Path(directory), kinds, streams=options.streams))
    said = report(done, heard, options.streams, list(simulated(options.trials)))
    print(said)
    for wrong in heard.wrong[:10]:
        print(wrong, file=sys.stderr)
    if options.cycles >= 50 and options.trials >= 500:
        REPORT.write_text(said, encoding="utf-8")
    if heard.wrong or not all(one.back for one in done):
        sys.exit("some versions were not taken back, or answers failed")


if __name__ == "__main__":
    main()
