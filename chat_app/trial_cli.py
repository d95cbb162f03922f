"""The commands of live trials and of the strength of versions: `zloop trial start|stop|status`, `zloop strength`.

Where it sits: beside `cli.py`, which takes them in. Each is one request to the API.
"""

from typing import Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, refuse, show

app = typer.Typer()
trial = typer.Typer(help="A live trial: a version is shown blind against the champion until the votes decide.")
app.add_typer(trial, name="trial")


@trial.command()
def start(
    version: Annotated[str, typer.Argument(help="The version to show against the champion.")],
    share: Annotated[
        float | None, typer.Option(help="Share of pairs that show it (default: ZLOOP_TRIAL_SHARE).")
    ] = None,
    max_votes: Annotated[
        int | None, typer.Option(min=1, help="Votes after which it ends undecided (default: ZLOOP_TRIAL_MAX_VOTES).")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; kept with the trial.")] = "",
    as_json: Json = False,
) -> None:
    """Start a live trial. It goes on over restarts of the server."""
    body = {"version": version, "share": share, "max_votes": max_votes, "reason": reason}
    with connected(as_json) as client:
        result = client.request("POST", "/v1/trials", body)
    show(
        result,
        as_json,
        f"{result['trial_id']}: {result['challenger']} is shown against {result['champion']} in {result['share']:.0%} "
        "of the pairs. Watch it with: zloop trial status"
        + (f"\nIt is shown in spite of this: {result['warning']}" if result["warning"] else ""),
    )


@trial.command()
def status(
    trial_id: Annotated[str | None, typer.Argument(help="Which one (default: the newest).")] = None,
    as_json: Json = False,
) -> None:
    """What the votes of a trial say."""
    with connected(as_json) as client:
        if trial_id is None:
            trials = client.request("GET", "/v1/trials")["trials"]
            if not trials:
                refuse("There was no live trial yet. Start one with: zloop trial start VERSION", as_json)
            result = trials[0]
        else:
            result = client.request("GET", f"/v1/trials/{trial_id}")
    show(result, as_json, f"{result['trial_id']}: {result['state']}. {_told(result)}")


@trial.command()
def stop(
    trial_id: Annotated[str | None, typer.Argument(help="Which one (default: the one that runs).")] = None,
    as_json: Json = False,
) -> None:
    """End a live trial; the champion stays."""
    with connected(as_json) as client:
        if trial_id is None:
            running = [one for one in client.request("GET", "/v1/trials")["trials"] if one["state"] == "running"]
            if not running:
                refuse("No live trial runs.", as_json)
            trial_id = running[0]["trial_id"]
        result = client.request("POST", f"/v1/trials/{trial_id}/stop")
    show(result, as_json, f"Stopped {result['trial_id']}. {result['sentence']}")


@app.command()
def strength(as_json: Json = False) -> None:
    """Is it getting better? The strength of every version from all blind picks."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/strength")
    lines = [result["sentence"], *(f"  {row['version']:<24} {_strength(row)}" for row in result["versions"])]
    lines += [f"  {one['at'][:16].replace('T', ' ')}  {one['version']} ({one['kind']})" for one in result["events"]]
    show(result, as_json, "\n".join(lines))


def _told(result: dict[str, Any]) -> str:
    reason = result["ended_reason"]
    return result["sentence"] if not reason or reason == result["sentence"] else f"{reason} {result['sentence']}"


def _strength(row: dict[str, Any]) -> str:
    if row["win_rate"] is None:
        return str(row["note"])
    if not row["votes"]:
        return "the reference" if row["win_rate"] == 0.5 else str(row["note"])
    low, high = row["interval"]
    return f"{row['win_rate']:>4.0%} ({low:.0%}–{high:.0%}), {row['votes']} picks"
