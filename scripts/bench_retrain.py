"""200 new picks → trained → evaluated → served: how long, on this machine? → docs/benchmarks/retrain.md.

    make bench-retrain                                   (over an hour, most of it compare turns)
    python scripts/bench_retrain.py --picks 40 --out -   a look, printed
    make bench-retrain FILE=F.jsonl.gz                   the first rows of a file of people's picks, hh-rlhf's say

A real server with the embedded model in a fresh data directory. Simulated people ask the practice prompts over the
HTTP API, see two real answers and pick the shorter, or a file is imported; then one retrain with the default recipe,
its verdict, a promotion whatever it says, and the first answer of the new version. The clock runs from the request for
the retrain.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server import Server, serving  # noqa: E402

from feedback_store.practice import load_practice  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "retrain.md"
TARGET_MIN = 15
WITHIN_S = 3 * 3600
PEOPLE = ("ada", "ben", "cleo", "dora")  # as many pairs at once as the embedded engine has room for


def imported(server: Server, path: Path, wanted: int, folder: Path) -> str:
    """The first `wanted` rows of a file as preferences: where they are from, in a sentence."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as whole, (folder / "picks.jsonl").open("w", encoding="utf-8") as rows:
        rows.writelines(islice(whole, wanted))
    told = server.upload(folder / "picks.jsonl")
    return f"The first {wanted} rows of {path.name} gave {told['imported']} preferences"


def collected(server: Server, wanted: int) -> str:
    """Compare turns until `wanted` picks teach (cut answers do not): how they came, in a sentence."""
    prompts = load_practice()
    random.Random(0).shuffle(prompts)  # the file begins with what is held out
    turns = enumerate(cycle(prompts), start=1)
    lengths: list[int] = []
    taught: list[str] = []
    turning = Lock()

    def sit(person: str) -> None:
        while len(taught) < wanted:
            with turning:
                seed, practice = next(turns)
            pair = server.pair(practice.prompt, seed=seed, user=person)
            first, second = (len(one["text"]) for one in pair["candidates"])
            choice = "first" if first <= second else "second"
            pick = server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": choice})
            lengths.extend([first, second])
            taught.extend([pick["preference_id"]] if pick["preference_id"] else [])

    with ThreadPoolExecutor(len(PEOPLE)) as people:
        list(people.map(sit, PEOPLE))
    return (
        f"{len(lengths) // 2} compare turns over the HTTP API, the shorter answer picked, gave {len(taught)} picks "
        f"that teach; an answer has {statistics.median(lengths):.0f} characters (median, answers that were cut too)"
    )


def retrain(server: Server) -> tuple[dict[str, float], dict[str, Any]]:
    """The seconds of each part, and the run."""
    began = time.monotonic()
    run_id = server.post("/v1/runs")["run_id"]
    run = server.run_to_its_end(run_id, WITHIN_S)
    judged = time.monotonic()
    if run["state"] != "finished":
        raise SystemExit(f"The run is {run['state']}: {run['error']}")
    server.post(f"/v1/versions/{run['version']}/promote", {"reason": "measured", "force": True})
    promoted = time.monotonic()
    answer = server.chat("Why is the sky blue?", max_tokens=1)
    if answer["model"] != run["version"]:
        raise SystemExit(f"{answer['model']} answered, not {run['version']}")
    ended = time.monotonic()
    return {
        "the steps of the training": run["preflight"]["actual"]["training_s"],
        "from the request to the verdict": judged - began,
        "promotion": promoted - judged,
        "first answer": ended - promoted,
        "all of it": ended - began,
    }, run


def report(spent: dict[str, float], run: dict[str, Any], source: str, file: Path | None) -> str:
    """The page of docs/benchmarks/."""
    minutes = spent["all of it"] / 60
    judged = sum(run["evaluation"][outcome] for outcome in ("wins", "ties", "losses"))
    return "\n".join(
        [
            "# From picks to a served version",
            "",
            f"`make bench-retrain{f' FILE={file.name}' if file else ''}`, {datetime.now(UTC):%Y-%m-%d}, "
            f"{os.cpu_count()} cores ({platform.machine()}), "
            f"Python {platform.python_version()}, no GPU, the embedded model, n = 1. {source}; {judged} of them were "
            f"held out and judged. The recipe is `{run['recipe']}`, one pass: {run['total_steps']} steps.",
            "",
            "| part | seconds |",
            "|---|---|",
            *(f"| {name} | {seconds:.1f} |" for name, seconds in spent.items()),
            "",
            f"**{minutes:.1f} minutes** (target: at most {TARGET_MIN}). {run['version']}: {run['verdict']['decision']}"
            f". {run['verdict']['reasons'][0]}",
            "",
        ]
    )


def main() -> None:
    """Collect, retrain, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--picks", type=int, default=200)
    parser.add_argument("--out", default=str(REPORT), help="a file, or - to print")
    parser.add_argument("--file", type=Path, help="take preferences from here instead of compare turns")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data") as server:
        if given.file is None:
            source = collected(server, given.picks)
        else:
            source = imported(server, given.file, given.picks, Path(folder))
        spent, run = retrain(server)
    text = report(spent, run, source, given.file)
    if given.out == "-":
        print(text)
    else:
        Path(given.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
