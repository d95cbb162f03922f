"""The command line: `zloop …`. Each command is one request to the API (see `client.py`); `--json` prints its body.

Exit codes: 0 done, 1 refused or failed (with a sentence on standard error), 2 wrong usage. Heavy imports stand inside
the commands, so that `--help` is instant.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from chat_app.settings import Settings, SettingsError, load_settings, settings_table

if TYPE_CHECKING:
    from chat_app.client import Client

app = typer.Typer(
    name="zloop",
    help="Zephyr Loop: a self-hosted chat assistant that gets better from its own people's ratings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after this many optimizer steps (default: the recipe's).")]
Processes = Annotated[int | None, typer.Option(min=1, help="Data-parallel processes (default: one per GPU, else one).")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run (default: the recipe's).")]
FOLLOW_EVERY_S = 1.0


def main() -> None:
    """Entry point of the `zloop` command."""
    app()


@app.command(epilog="Settings: " + " · ".join(f"{name} ({default})" for name, default, _ in settings_table()))
def serve(as_json: Json = False) -> None:
    """Serve the chat, the admin page and the API."""
    from chat_app.__main__ import CannotServe
    from chat_app.__main__ import serve as run_server

    try:
        run_server(_settings(), as_json=as_json)
    except CannotServe as error:
        _refuse(str(error), as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A .jsonl, .json, .parquet or .csv file (also .gz), or a hub id.")],
    format_: Annotated[str, typer.Option("--format", help="auto, ultrafeedback_binarized, argilla or trl.")] = "auto",
    as_json: Json = False,
) -> None:
    """Import preferences. All or nothing; the same file twice changes nothing."""
    path = Path(source).expanduser()
    body = {"source": str(path.absolute()) if path.exists() else source, "format": format_}
    with _connected(as_json) as client:
        result = client.request("POST", "/v1/imports", body)
    skipped = ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items()) or "none"
    _show(
        result,
        as_json,
        f"Imported {result['imported']} preferences from {source} (format {result['format']}); "
        f"{result['duplicates']} were there already; skipped: {skipped}.",
    )


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="File to write.")],
    format_: Annotated[str, typer.Option("--format", help="trl (JSON lines) or csv.")] = "trl",
    as_json: Json = False,
) -> None:
    """Write every preference to a file."""
    with _connected(as_json) as client:
        text = client.text(f"/v1/export?format={format_}")
    temporary = out.with_name(out.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        _refuse(f"{out} could not be written: {error.strerror}. Choose a file in a directory that exists.", as_json)
    _show({"out": str(out), "bytes": len(text.encode())}, as_json, f"Wrote {out} ({len(text.encode())} bytes).")


@app.command()
def snapshot(as_json: Json = False) -> None:
    """Freeze the present preferences into a snapshot (a run does this by itself)."""
    with _connected(as_json) as client:
        result = client.request("POST", "/v1/snapshots", {})
    _show(
        result,
        as_json,
        f"Snapshot {result['snapshot']}: {result['train']} preferences to train on, {result['held_out']} held out.",
    )


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="A recipe of trainer/recipes (default: dpo-lora).")] = None,
    max_steps: Steps = None,
    num_processes: Processes = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Retrain from the preferences, evaluate, and say whether it got better. Never promotes by itself."""
    _start_and_follow({"recipe": recipe, "max_steps": max_steps, "num_processes": num_processes, "seed": seed}, as_json)


@app.command()
def practice(
    taste: Annotated[str, typer.Option(help="shorter, bullets or question.")] = "shorter",
    num_processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Teach it a taste: the whole loop in minutes, on prepared pairs kept apart from the real preferences."""
    _start_and_follow({"practice": taste, "num_processes": num_processes}, as_json)


@app.command()
def evaluate(
    version: Annotated[str, typer.Argument(help="The version to judge.")],
    against: Annotated[str | None, typer.Option(help="The version to compare with (default: the champion).")] = None,
    as_json: Json = False,
) -> None:
    """Judge a version against another on the held-out pairs of its own snapshot."""
    with _connected(as_json) as client:
        result = client.request("POST", "/v1/evaluations", {"version": version, "against": against})
    _show(result, as_json, "\n".join(result["verdict"]["reasons"]))


@app.command()
def versions(as_json: Json = False) -> None:
    """List the versions and which one is the champion."""
    with _connected(as_json) as client:
        result = client.request("GET", "/v1/versions")
    lines = [
        f"{'→' if row['state'] == 'champion' else ' '} {row['version']:<24} {row['state']:<10} {row['summary']}"
        for row in result["versions"]
    ]
    _show(result, as_json, "\n".join(lines))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="The version that is to answer from now on.")],
    reason: Annotated[str, typer.Option(help="Why; kept with the promotion.")] = "",
    as_json: Json = False,
) -> None:
    """Make a version the champion. Replies in flight finish on the version they began with."""
    with _connected(as_json) as client:
        result = client.request("POST", f"/v1/versions/{version}/promote", {"reason": reason})
    _show(result, as_json, f"The champion is {result['champion']} now; before it was {result['previous']}.")


@app.command()
def rollback(as_json: Json = False) -> None:
    """Go back to the champion before this one."""
    with _connected(as_json) as client:
        result = client.request("POST", "/v1/rollback", {})
    _show(result, as_json, f"Rolled back to {result['champion']} from {result['previous']}.")


@app.command()
def verify(as_json: Json = False) -> None:
    """Re-derive every hash of the snapshots and versions in the data directory."""
    from chat_app.__main__ import verify_all

    problems, checked = verify_all(_settings(as_json))
    result = {"checked": checked, "problems": problems}
    if problems:
        _show(result, as_json, "", stream=sys.stdout)
        _refuse("\n".join(problems), as_json, silent=as_json)
    _show(result, as_json, f"Checked {len(checked)} snapshots and versions: every hash agrees.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here and what is missing: engine, model, training packages, data directory, server."""
    from chat_app.__main__ import diagnose

    findings = diagnose(_settings(as_json))
    ok = all(finding["ok"] for finding in findings)
    lines = [f"{'ok ' if finding['ok'] else 'NO '} {finding['what']}: {finding['detail']}" for finding in findings]
    _show({"ok": ok, "findings": findings}, as_json, "\n".join(lines))
    if not ok:
        raise typer.Exit(1)


def _start_and_follow(request: dict[str, Any], as_json: bool) -> None:
    with _connected(as_json, with_trainer=True) as client:
        started = client.request(
            "POST", "/v1/runs", {key: value for key, value in request.items() if value is not None}
        )
        if not as_json:
            typer.echo(f"{started['run_id']} started ({client.where}). It goes on if you leave.")
        run = _follow(client, started["run_id"], _discard if as_json else typer.echo)
        if run["state"] != "finished":
            _refuse(f"{run['run_id']} ended as {run['state']}. {run['error'] or ''}".strip(), as_json, run)
        verdict = run["verdict"]
        _show(
            run,
            as_json,
            f"{run['version']}: {verdict['decision']}.\n" + "\n".join(verdict["reasons"]) + f"\n"
            f"Serve it with: zloop promote {run['version']}",
        )


def _follow(client: "Client", run_id: str, say: Callable[[str], None]) -> dict[str, Any]:
    said = ""
    while True:
        run = client.request("GET", f"/v1/runs/{run_id}")
        line = _progress(run)
        if line != said:
            say(line)
            said = line
        if run["state"] in ("finished", "failed", "cancelled"):
            return run
        time.sleep(FOLLOW_EVERY_S)


def _progress(run: dict[str, Any]) -> str:
    metrics = run["metrics"]
    if run["state"] != "training" or not metrics:
        return f"  {run['state']}" + (f" {run['progress']}" if run.get("progress") else "")
    eta = f", about {run['eta_s']:.0f} s left" if run["eta_s"] is not None else ""
    return (
        f"  step {run['step']} of {run['total_steps']}: loss {metrics['loss']:.4f}, "
        f"margin {metrics['rewards/margins']:+.3f}, accuracy {metrics['rewards/accuracies']:.0%}{eta}"
    )


def _discard(_: str) -> None:
    """Say nothing: `--json` prints one object only."""


def _settings(as_json: bool = False) -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        _refuse(str(error), as_json)


@contextmanager
def _connected(as_json: bool, *, with_trainer: bool = False) -> "Iterator[Client]":
    import httpx

    from chat_app.client import ApiRefused, connect
    from feedback_store.errors import StoreError

    settings = _settings(as_json)
    try:
        with connect(settings, with_trainer=with_trainer) as client:
            yield client
    except ApiRefused as error:
        _refuse(str(error), as_json, error.body)
    except StoreError as error:
        _refuse(str(error), as_json)
    except httpx.HTTPError as error:
        _refuse(f"The server did not answer ({type(error).__name__}). Try again, or look at its log.", as_json)


def _show(body: dict[str, Any], as_json: bool, text: str, stream: Any = None) -> None:
    typer.echo(json.dumps(body) if as_json else text, file=stream)


def _refuse(message: str, as_json: bool, body: dict[str, Any] | None = None, *, silent: bool = False) -> NoReturn:
    if as_json and not silent:
        typer.echo(json.dumps(body or {"error": {"type": "refused", "message": message}}))
    typer.echo(f"zloop: {message}", err=True)
    raise typer.Exit(1)
