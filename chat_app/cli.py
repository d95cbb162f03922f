"""The command line: `zloop …`. Each command is one request to the API (see `client.py`); `--json` prints its body.

The commands of the data (import, export, backup, erase …) are in `data_cli.py`. Exit codes: 0 done, 1 refused or
failed (with a sentence on standard error), 2 wrong usage. Heavy imports stand inside the commands, so that `--help` is
instant.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chat_app import data_cli, evaluation_cli, proposal_cli, raters_cli, scheduling_cli, trial_cli, watching_cli
from chat_app.cli_tools import Json, connected, refuse, settings, show
from chat_app.proposal_cli import By
from chat_app.settings import settings_table
from feedback_store.private_files import new_files_private

if TYPE_CHECKING:
    from chat_app.client import Client

app = typer.Typer(
    name="zloop",
    help="Zephyr Loop: a self-hosted chat assistant that gets better from its own people's ratings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after this many optimizer steps (default: the recipe's).")]
Processes = Annotated[int | None, typer.Option(min=1, help="Data-parallel processes (default: one per GPU, else one).")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run (default: the recipe's).")]
Maintenance = Annotated[
    bool, typer.Option("--maintenance", help="Where two models do not fit: one after the other, answers wait.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Do it although something speaks against that version; needs --reason.")
]
FOLLOW_EVERY_S = 1.0
EVENTS = 10


app.add_typer(data_cli.app)
app.add_typer(evaluation_cli.app)
app.add_typer(watching_cli.app)
app.add_typer(scheduling_cli.app)
app.add_typer(trial_cli.app)
app.add_typer(proposal_cli.app)
app.add_typer(raters_cli.app)


def main() -> None:
    """Entry point of the `zloop` command."""
    new_files_private()
    app()


@app.command(epilog="Settings: " + " · ".join(f"{name} ({default})" for name, default, _ in settings_table()))
def serve(as_json: Json = False) -> None:
    """Serve the chat, the admin page and the API."""
    from chat_app.__main__ import serve as run_server
    from chat_app.engines import CannotServe

    try:
        run_server(settings(), as_json=as_json)
    except CannotServe as error:
        refuse(str(error), as_json)


@app.command()
def snapshot(
    recipe: Annotated[str | None, typer.Option(help="The recipe whose mix is used (default: dpo-lora).")] = None,
    as_json: Json = False,
) -> None:
    """Freeze the present preferences into a snapshot (a run does this by itself)."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/snapshots", {"recipe": recipe})
    left_out = "".join(f"\n  left out, {reason}: {count}" for reason, count in result["left_out"].items())
    redacted = "".join(f"\n  hidden, {kind}: {count}" for kind, count in result["redacted"].items())
    show(
        result,
        as_json,
        f"Snapshot {result['snapshot']}: {result['train']} preferences to train on, {result['held_out']} held out."
        f"{left_out}{redacted}",
    )


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes: what each learns from, and how."""
    with connected(as_json, with_trainer=True) as client:
        result = client.request("GET", "/v1/recipes")
    lines = [f"{row['name']:<24} {row['error'] or row['about']}" for row in result["recipes"]]
    show(result, as_json, "\n".join(lines))


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe by name, see `zloop recipes` (default: dpo-lora).")
    ] = None,
    max_steps: Steps = None,
    num_processes: Processes = None,
    seed: Seed = None,
    launcher: Annotated[str | None, typer.Option(help="local, slurm or ray (default: ZLOOP_LAUNCHER).")] = None,
    strategy: Annotated[str | None, typer.Option(help="ddp, fsdp2 or zero3 (default: ZLOOP_STRATEGY).")] = None,
    machines: Annotated[int | None, typer.Option(min=1, help="Machines that share the processes.")] = None,
    deadline_minutes: Annotated[
        float | None, typer.Option(help="Stop it after so long; what was learned is kept, to resume.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out every row of this rater; may be given several times.")
    ] = None,
    show_command: Annotated[
        bool, typer.Option("--show-command", help="Start nothing: print the `accelerate launch` line that would do it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take and whether it fits.")
    ] = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Retrain from the preferences, evaluate, and say whether it got better. What follows is ZLOOP_POLICY's."""
    request = {
        "recipe": recipe,
        "max_steps": max_steps,
        "num_processes": num_processes,
        "seed": seed,
        "launcher": launcher,
        "strategy": strategy,
        "machines": machines,
        "deadline_minutes": deadline_minutes,
        "without": without,
    }
    if dry_run:
        scheduling_cli.show_preflight(request, as_json)
    elif show_command:
        _show_command(request, as_json)
    else:
        _start_and_follow({**request, "by": by}, as_json)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="The run that failed or was cancelled.")],
    as_json: Json = False,
) -> None:
    """Go on with a run that failed or was cancelled, from its last checkpoint."""
    _start_and_follow({}, as_json, f"/v1/runs/{run}/resume")


@app.command()
def practice(
    taste: Annotated[str, typer.Option(help="shorter, bullets or question.")] = "shorter",
    num_processes: Processes = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Teach it a taste: the whole loop in minutes, on prepared pairs kept apart from the real preferences."""
    _start_and_follow({"practice": taste, "num_processes": num_processes, "by": by}, as_json)


@app.command()
def versions(as_json: Json = False) -> None:
    """List the versions, which one is the champion, and how the last champions came to be."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/versions")
    lines = [
        f"{'→' if row['state'] == 'champion' else ' '} {row['version']:<24} {row['state']:<10} {row['summary']}"
        for row in result["versions"]
    ]
    lines += [_event(one) for one in result["history"][:EVENTS]]
    show(result, as_json, "\n".join(lines))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="The version that is to answer from now on.")],
    reason: Annotated[str, typer.Option(help="Why; kept with the promotion.")] = "",
    maintenance: Maintenance = False,
    bake: Annotated[
        bool, typer.Option("--bake/--no-bake", help="Watch it, and go back by itself where it is clearly worse.")
    ] = True,
    by: By = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a version the champion. Replies in flight finish on the version they began with."""
    with connected(as_json) as client:
        body = {"reason": reason, "maintenance": maintenance, "bake": bake, "by": by, "force": force}
        result = client.request("POST", f"/v1/versions/{version}/promote", body)
    show(result, as_json, f"The champion is {result['champion']} now; before it was {result['previous']}.")


@app.command()
def rollback(
    maintenance: Maintenance = False,
    force: Force = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "",
    as_json: Json = False,
) -> None:
    """Go back to the champion before this one."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/rollback", {"maintenance": maintenance, "force": force, "reason": reason})
    show(result, as_json, f"Rolled back to {result['champion']} from {result['previous']}.")


@app.command()
def baking(as_json: Json = False) -> None:
    """How a new champion does against the version before, and what was taken back by itself."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/baking")
    lines = [result["sentence"] or "No new champion is being watched."]
    lines += [
        f"  {row['measure']:<10} {row['bad']:>4} of {row['of']:<5} before: {row['bad_before']:>4} of {row['of_before']}"
        for row in result.get("measures", ())
    ]
    lines += [f"  earlier: {why}" for why in result["taken_back"].values() if why != result["sentence"]]
    show(result, as_json, "\n".join(lines))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here and what is missing: engine, model, training packages, data directory, server."""
    from chat_app.__main__ import diagnose

    findings = diagnose(settings(as_json))
    ok = all(finding["ok"] for finding in findings)
    lines = [f"{'ok ' if finding['ok'] else 'NO '} {finding['what']}: {finding['detail']}" for finding in findings]
    show({"ok": ok, "findings": findings}, as_json, "\n".join(lines))
    if not ok:
        raise typer.Exit(1)


def _start_and_follow(request: dict[str, Any], as_json: bool, route: str = "/v1/runs") -> None:
    with connected(as_json, with_trainer=True) as client:
        started = client.request("POST", route, {key: value for key, value in request.items() if value is not None})
        if not as_json:
            typer.echo(f"{started['run_id']} started ({client.where}). It goes on if you leave.")
        run = _follow(client, started["run_id"], _discard if as_json else typer.echo)
        if run["state"] != "finished":
            refuse(f"{run['run_id']} ended as {run['state']}. {run['error'] or ''}".strip(), as_json, run)
        verdict, version = run["verdict"], run["version"]
        rows = client.request("GET", "/v1/versions")["versions"]
        against = next((row["against"] for row in rows if row["version"] == version), None)
        how = f"Serve it with: zloop promote {version}"
        if against:
            how = f'To serve it in spite of that: zloop promote {version} --force --reason "…"'
        show(run, as_json, f"{version}: {verdict['decision']}.\n" + "\n".join(verdict["reasons"]) + f"\n{how}")


def _event(one: dict[str, Any]) -> str:
    """One line of the history, and what was known against it in a second one."""
    how = f"{one['kind']}, forced" if one["forced"] else one["kind"]
    said = (
        f"  {one['at'][:16].replace('T', ' ')}  {one['version']} in place of {one['previous']} ({how}, by {one['by']})"
    )
    said += f": {one['reason']}" if one["reason"] else ""
    return said + (f"\n      {one['note']}" if one["note"] else "")


def _show_command(request: dict[str, Any], as_json: bool) -> None:
    """The lines alone on standard output, ready to be pasted or piped; what stands around them as comments."""
    asked = {key: value for key, value in request.items() if value is not None}
    with connected(as_json) as client:
        command = client.request("POST", "/v1/runs", {**asked, "dry_run": True})["command"]
    commented = "".join(
        f"# {title}\n" + "".join(f"#   {line}\n" for line in command[key].splitlines())
        for title, key in (
            ("RUN_DIR/accelerate.yaml", "accelerate"),
            ("The recipe, resolved", "recipe"),
            ("What the launcher submits", "submission"),
        )
        if command[key]
    )
    where = "one line for each machine, the first on this one" if len(command["lines"]) > 1 else "one line"
    show(
        command,
        as_json,
        f"# Trains in {command['directory']} ({where}); its result is not published.\n"
        + commented
        + "\n".join(command["lines"]),
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
    line = f"  step {run['step']} of {run['total_steps']}: loss {metrics['loss']:.4f}"
    if "rewards/margins" in metrics:
        line += f", margin {metrics['rewards/margins']:+.3f}"
    if "rewards/accuracies" in metrics:
        line += f", accuracy {metrics['rewards/accuracies']:.0%}"
    return line + eta


def _discard(_: str) -> None:
    """Say nothing: `--json` prints one object only."""
