"""The commands of proposals: `zloop proposals`, `zloop dismiss VERSION`. To follow one: `zloop promote VERSION`.

Where it sits: beside `cli.py`, which takes them in. Each is one request to the API.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, show

app = typer.Typer()
By = Annotated[str | None, typer.Option(help="Who you are; kept with it (ZLOOP_APPROVAL=other asks for it).")]
SHOWN = 10


@app.command()
def proposals(as_json: Json = False) -> None:
    """The versions that seem better and wait for a person's word, and the policy."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/proposals")
    lines = [f"Policy: {result['policy']}. Approval by another person: {result['approval']}."]
    lines += [_told(one) for one in result["proposals"]] or ["Nothing is proposed."]
    lines += [
        f"  earlier: {one['version']} against {one['champion']}, {one['state']}" for one in result["ended"][:SHOWN]
    ]
    show(result, as_json, "\n".join(lines))


@app.command()
def dismiss(
    version: Annotated[str, typer.Argument(help="The version that is not to be proposed any more.")],
    reason: Annotated[str, typer.Option(help="Why; kept with it.")] = "",
    by: By = None,
    as_json: Json = False,
) -> None:
    """Propose a version no longer; the champion stays."""
    with connected(as_json) as client:
        result = client.request("POST", f"/v1/proposals/{version}/dismiss", {"reason": reason, "by": by})
    show(result, as_json, f"{version} is not proposed any more.")


def _told(one: Mapping[str, Any]) -> str:
    head = f"{one['version']} against {one['champion']} ({one['source']}): {one['sentence']}"
    if one["state"] == "waiting":
        return f"{head}\n  It waits: {one['reason']}"
    return "\n  ".join(filter(None, (head, one["reason"], f"Follow it: zloop promote {one['version']}")))
