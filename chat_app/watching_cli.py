"""The commands of watching: `zloop runs [RUN] [--follow]`, `zloop worth`. Mounted by `cli.py`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, refuse, show

if TYPE_CHECKING:
    from chat_app.client import Client

app = typer.Typer()
FOLLOW_EVERY_S = 1.0
ENDED = ("finished", "failed", "cancelled")


@app.command()
def runs(
    run: Annotated[str | None, typer.Argument(help="A run to look at (default: list them all).")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print each step until the run ends.")] = False,
    log: Annotated[int | None, typer.Option(min=1, max=1000, help="Print so many last lines of its log.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write its report (HTML) to this file.")] = None,
    as_json: Json = False,
) -> None:
    """List the runs, or watch one: steps, log, report. `--follow` alone watches the newest."""
    with connected(as_json) as client:
        if run is None and (follow or log or report):
            run = _newest(client, as_json)
        if run is None:
            listed = client.request("GET", "/v1/runs")
            show(listed, as_json, "\n".join(map(_row, listed["runs"])) or "There are no runs yet.")
        elif report is not None:
            _save(client.text(f"/v1/runs/{run}/report"), report, as_json)
            show({"run_id": run, "report": str(report)}, as_json, f"The report of {run} is in {report}.")
        elif log is not None:
            tail = client.request("GET", f"/v1/runs/{run}/log?lines={log}")
            show(tail, as_json, "\n".join(tail["lines"]))
        else:
            _watch(client, run, as_json, follow=follow)


@app.command()
def worth(as_json: Json = False) -> None:
    """Say what a retrain now is expected to gain, and how sure that is."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/worth")
    show(result, as_json, result["sentence"])


def _save(page: str, path: Path, as_json: bool) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        refuse(f"{path} cannot be written ({error.strerror}). Name another file with --report.", as_json)


def _newest(client: "Client", as_json: bool) -> str:
    found: list[dict[str, Any]] = client.request("GET", "/v1/runs")["runs"]
    if not found:
        refuse("There are no runs yet. Start one: zloop train", as_json)
    return str(found[0]["run_id"])


def _watch(client: "Client", run: str, as_json: bool, *, follow: bool) -> None:
    """Its steps so far, and with `follow` those to come; then how it stands."""
    since, lines = 0, []
    while True:
        body = client.request("GET", f"/v1/runs/{run}")  # before its lines, so that the last ones are not missed
        new = client.request("GET", f"/v1/runs/{run}/metrics?since={since}")["lines"]
        lines += new
        since = max([since, *(line["step"] for line in new)])
        if not as_json:
            for line in new:
                typer.echo(_step(line, body["total_steps"]))
        if not follow or body["state"] in ENDED:
            break
        time.sleep(FOLLOW_EVERY_S)
    show({**body, "lines": lines}, as_json, _standing(body))


def _row(body: Mapping[str, Any]) -> str:
    verdict = body["verdict"]["decision"] if body["verdict"] else ""
    steps = f"{body['step']}/{body['total_steps']}"
    return f"{body['run_id']}  {body['state']:<10} {body['recipe']:<12} {steps:>9}  {body['version'] or '–'} {verdict}"


def _standing(body: Mapping[str, Any]) -> str:
    """How a run stands, in words."""
    said = [_row(body)]
    if body["error"]:
        said.append(body["error"])
    if body["verdict"]:
        said += body["verdict"]["reasons"]
    if body["state"] in ENDED:
        said.append(f"Its report: zloop runs {body['run_id']} --report report.html")
    return "\n".join(said)


SHOWN = (
    ("loss", "loss {:.4f}"),
    ("rewards/margins", "margin {:+.3f}"),
    ("rewards/accuracies", "accuracy {:.0%}"),
    ("grad_norm", "grad {:.2f}"),
    ("eval/loss", "loss {:.4f}"),
    ("eval/rewards/margins", "margin {:+.3f}"),
    ("eval/rewards/accuracies", "accuracy {:.0%}"),
)


def _step(line: Mapping[str, Any], total: int) -> str:
    """One line of metrics.jsonl for a terminal."""
    what = "step" if "loss" in line else "  validation after step"
    values = [form.format(line[key]) for key, form in SHOWN if line.get(key) is not None]
    return f"{what} {line['step']} of {total}: " + ", ".join(values)
