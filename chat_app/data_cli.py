"""The commands of the data a team owns: import, export, stats, sql, learn, erase, backup, restore, verify.

Where it sits: beside `cli.py`, which takes them in. Each is one request to the API; `restore` and `verify` work on the
data directory itself.
"""

import sys
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from chat_app.cli_tools import Json, connected, readable, refuse, settings, show

app = typer.Typer()

SHOWN_ROWS = 50
CELL_CHARACTERS = 60


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A .jsonl, .json, .parquet or .csv file (also .gz), or a hub id.")],
    format_: Annotated[
        str, typer.Option("--format", help="auto finds it out; the formats are listed in the README.")
    ] = "auto",
    rejected: Annotated[
        str, typer.Option(help="Raw UltraFeedback: the worse answer is a random one, or the worst one.")
    ] = "random",
    score: Annotated[
        str, typer.Option(help="Raw UltraFeedback: answers rank by ratings or overall_score.")
    ] = "ratings",
    seed: Annotated[int, typer.Option(min=0, help="Raw UltraFeedback: seed of the random choice.")] = 0,
    show_skipped: Annotated[
        bool, typer.Option("--show-skipped", help="Name some skipped rows of each reason.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Import preferences. All or nothing; the same file twice changes nothing."""
    _require_source(source, as_json)
    body = {"format": format_, "rejected": rejected, "score": score, "seed": seed}
    with connected(as_json) as client, readable(source, as_json) as body["source"], _progress_bar(as_json) as bar:
        result = client.watch("POST", "/v1/imports", body, "/v1/imports", lambda seen: _advance(bar, seen["active"]))
    skipped = ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items()) or "none"
    examples = "".join(
        f"\n  {reason}: row {', '.join(map(str, numbers))}{' …' if result['skipped'][reason] > len(numbers) else ''}"
        for reason, numbers in result["examples"].items()
    )
    show(
        result,
        as_json,
        f"Imported {result['imported']} preferences from {source} (format {result['format']}: {result['why']}); "
        f"{result['duplicates']} were there already; skipped: {skipped}.{examples if show_skipped else ''}",
    )


def _require_source(source: str, as_json: bool) -> None:
    from feedback_store.importers.sources import is_hub_id

    path = Path(source).expanduser()
    if not path.is_file() and (path.exists() or not is_hub_id(source)):
        why = "it is a folder. Name one file in it." if path.is_dir() else "there is no such file. "
        more = "" if path.is_dir() else "Give a path, or owner/name of a data set on the hub."
        refuse(f"Nothing was imported from {source}: {why}{more}", as_json)


@app.command()
def export(
    out: Annotated[Path | None, typer.Option(help="File to write; for a dataset, the folder.")] = None,
    format_: Annotated[
        str, typer.Option("--format", help="trl or kto (JSON lines), csv, or dataset (a folder with a card).")
    ] = "trl",
    raters: Annotated[str, typer.Option(help="Dataset: keep, hash or drop the raters' names.")] = "hash",
    push: Annotated[str | None, typer.Option(help="Dataset: owner/name of a hub data set to push it to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the pushed data set public.")] = False,
    as_json: Json = False,
) -> None:
    """Write every preference to a file, or to a folder that the datasets library opens."""
    if format_ == "dataset":
        body = {
            "out": None if out is None else f"to-deliver-{uuid4().hex}",
            "raters": raters,
            "push": push,
            "public": public,
        }
        with connected(as_json) as client:
            if out is not None:
                _check_delivery(out, as_json)
            result = client.request("POST", "/v1/datasets", body)
            if out is not None:
                result["directory"] = _delivered(Path(result["directory"]), out, as_json)
        rows = ", ".join(f"{name} {count}" for name, count in result["rows"].items())
        pushed = f" Pushed to {result['url']}." if result["url"] else ""
        show(result, as_json, f"Wrote {result['directory']} ({rows}).{pushed}")
        return
    if out is None or push is not None:
        refuse("Name a file with --out; only --format dataset can be pushed.", as_json)
    with connected(as_json) as client:
        text = client.text(f"/v1/export?format={format_}")
    temporary = out.with_name(out.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(out)
    except OSError as error:
        refuse(f"{out} could not be written: {error.strerror}. Choose a file in a directory that exists.", as_json)
    show({"out": str(out), "bytes": len(text.encode())}, as_json, f"Wrote {out} ({len(text.encode())} bytes).")


def _check_delivery(out: Path, as_json: bool) -> None:
    from feedback_store.dataset_export import refuse_to_replace
    from feedback_store.errors import Conflict

    try:
        refuse_to_replace(out.absolute())
    except Conflict as error:
        refuse(str(error), as_json)


def _delivered(made: Path, out: Path, as_json: bool) -> str:
    """A data set that the server made, where the person wants it: with their own rights, not the server's."""
    from feedback_store.dataset_export import deliver_dataset
    from feedback_store.errors import StoreError

    try:
        return str(deliver_dataset(made, out.absolute()).directory)
    except StoreError as error:
        refuse(str(error), as_json)


@app.command()
def stats(
    agreement: Annotated[bool, typer.Option("--agreement", help="Also say how far raters agree.")] = False,
    as_json: Json = False,
) -> None:
    """Count what there is and how people judge."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/statistics")
        if agreement:
            result["agreement"] = client.request("GET", "/v1/agreement")
    counts = result["counts"]
    lines = [
        f"{counts['picks']} picks that stand: " + ", ".join(f"{n} {pick}" for pick, n in result["picks"].items()),
        "preferences: " + ", ".join(f"{n} {source}" for source, n in counts["preferences"].items() if n),
        f"{counts['train']} to train on, {counts['held_out']} held out",
        "ratings: " + (", ".join(f"{n} {way}" for way, n in result["ratings"].items()) or "none"),
        f"{result['edits']} edits",
    ]
    if agreement:
        said = result["agreement"]
        lines += [said["sentence"], f"{said['contradictions']} pairs were judged in opposite ways."]
    show(result, as_json, "\n".join(lines))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT.")],
    limit_s: Annotated[float, typer.Option(min=0.1, max=60, help="Stop it after this many seconds.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Ask the store one question, read-only."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/query", {"sql": query, "limit_s": limit_s})
    rows = [result["columns"], *result["rows"][:SHOWN_ROWS]]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(result["columns"]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    more = len(result["rows"]) - SHOWN_ROWS
    if more > 0 or result["truncated"]:
        lines.append(f"… {max(more, 0)} more rows fetched{', and there are more' if result['truncated'] else ''}.")
    show(result, as_json, "\n".join(lines))


@app.command()
def learn(
    scope: Annotated[str, typer.Argument(help="conversation or rater.")],
    subject: Annotated[str, typer.Argument(help="The conversation's id, or the person's name.")],
    yes: Annotated[bool, typer.Option("--yes/--no", help="Whether these words may teach.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a conversation's or a person's words may teach. The default is no."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/learning", {"scope": scope, "subject": subject, "learn": yes})
    show(result, as_json, f"From now on {scope} {subject} {'may teach' if yes else 'teaches nothing'}.")


@app.command()
def erase(
    user: Annotated[str, typer.Argument(help="The person whose words are to go.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a person's words everywhere, for ever, and name the versions trained on them."""
    if not yes and sys.stdin.isatty() and not as_json:
        typer.confirm(f"Remove every word of {user!r} from the store, snapshots and backups, for ever?", abort=True)
    with connected(as_json) as client:
        result = client.request("POST", "/v1/erasures", {"rater": user})
    show(result, as_json, result["sentence"])


@app.command()
def backup(
    list_: Annotated[bool, typer.Option("--list", help="List the backups instead of making one.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the store while it works, into backups/ of the data directory."""
    with connected(as_json) as client:
        if list_:
            found = client.request("GET", "/v1/backups")
            show(found, as_json, "\n".join(one["path"] for one in found["backups"]) or "There are no backups.")
            return
        made = client.request("POST", "/v1/backups")
    show(made, as_json, f"Backed up to {made['path']}.")


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(help="A file of backups/.")],
    as_json: Json = False,
) -> None:
    """Put a backup in the store's place. The present store is kept as a backup; nothing is lost."""
    from chat_app.client import find_server
    from feedback_store.backup import restore as put_back
    from feedback_store.errors import StoreError
    from feedback_store.records import now

    directory = settings(as_json).data_dir
    server = find_server(directory)
    if server is not None:
        refuse(f"A server runs on this data directory ({server.url}, process {server.pid}). Stop it first.", as_json)
    try:
        restored = put_back(backup, directory / "store.duckdb", now())
    except StoreError as error:
        refuse(str(error), as_json)
    kept = str(restored.kept) if restored.kept else None
    show({"restored": str(backup), "kept": kept, "erased": dict(restored.erased)}, as_json, restored.sentence)


@app.command()
def verify(as_json: Json = False) -> None:
    """Re-derive every hash of the snapshots, versions and backups in the data directory."""
    from chat_app.__main__ import verify_all

    problems, checked = verify_all(settings(as_json))
    result = {"checked": checked, "problems": problems}
    if problems:
        show(result, as_json, "", stream=sys.stdout)
        refuse("\n".join(problems), as_json, silent=as_json)
    show(result, as_json, f"Checked {len(checked)} snapshots, versions and backups: every hash agrees.")


def _cell(value: Any) -> str:
    text = "" if value is None else str(value).replace("\n", " ")
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 1] + "…"


def _progress_bar(as_json: bool) -> Any:
    """A bar on standard error where a person watches, else one that shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("reading"), BarColumn(), TextColumn("{task.fields[rows]:,} rows"), TimeElapsedColumn(),
        console=Console(stderr=True), disable=as_json or not sys.stderr.isatty(), transient=True,
    )  # fmt: skip


def _advance(bar: Any, active: dict[str, Any] | None) -> None:
    if active is None:
        return
    if not bar.task_ids:
        bar.add_task("import", total=active["bytes_total"], rows=0)
    bar.update(bar.task_ids[0], completed=active["bytes"] or 0, rows=active["rows"])
