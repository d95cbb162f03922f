"""The command of the schedule, and the dry run of `zloop train`.

Where it sits: beside `cli.py`, which takes it in; each is one request to the API.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, refuse, show

app = typer.Typer()

SHOWN = 10


@app.command()
def schedule(
    cron: Annotated[str | None, typer.Option(help="Times as five cron fields, such as '0 2 * * *'; '': none.")] = None,
    every: Annotated[int | None, typer.Option(min=0, help="Start after this many new preferences; 0: never.")] = None,
    at_least: Annotated[
        int | None, typer.Option(min=0, help="New preferences that a time of --cron needs; else it is skipped.")
    ] = None,
    quiet: Annotated[str | None, typer.Option(help="Hours without a start, such as 08:00-18:00; '': none.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="Of --cron and --quiet, such as Europe/Berlin.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Start nothing by itself any more.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Back to what the settings (ZLOOP_…) say.")] = False,
    as_json: Json = False,
) -> None:
    """Show when runs start by themselves and what was decided lately; with options, change it for good."""
    given = {"cron": cron, "every": every, "at_least": at_least, "quiet": quiet, "time_zone": time_zone}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {name: None for name in ("cron", "quiet") if changes.get(name) == ""}
    if off + reset + bool(changes) > 1:
        refuse("--off, --reset and new values exclude each other: give one of them.", as_json)
    if off:
        changes = {"cron": None, "every": 0}
    elif reset:
        changes = {"reset": True}
    with connected(as_json) as client:
        result = client.request("PUT", "/v1/schedule", changes) if changes else client.request("GET", "/v1/schedule")
    show(result, as_json, "\n".join(_lines(result)))


def show_preflight(request: Mapping[str, Any], as_json: bool) -> None:
    """What a run would take; exit code 1 where it would be refused."""
    with connected(as_json) as client:
        body = {key: value for key, value in request.items() if value is not None}
        result = client.request("POST", "/v1/preflight", body)
    if result["refusal"]:
        refuse(result["refusal"], as_json, result)
    lines = [result["sentence"]]
    if result["estimate"]:
        lines.append(f"  {result['pairs']} pairs in {result['steps']} steps. {result['estimate']['basis']}")
    if result["warning"]:
        lines.append(f"  {result['warning']}")
    show(result, as_json, "\n".join(lines))


def _lines(state: Mapping[str, Any]) -> list[str]:
    number = f"after {state['every']} new preferences" if state["every"] else "not by number"
    times = f"at {state['cron']} ({state['time_zone']}, with at least {state['at_least']} new)" if state["cron"] else ""
    return [
        state["outlook"],
        f"  schedule: {', '.join(filter(None, [times, number]))}"
        + (f", never in {state['quiet']}" if state["quiet"] else "")
        + f" – {state['from']}"
        + (f" by {state['changed_by']}" if state["changed_by"] else ""),
        *(f"  {one['at'][:16].replace('T', ' ')}  {one['sentence']}" for one in state["decisions"][:SHOWN]),
    ]
