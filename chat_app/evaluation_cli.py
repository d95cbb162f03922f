"""The commands of judging: `zloop evaluate VERSION [--benchmark mt-bench]`, `zloop compare`. Mounted by `cli.py`."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, readable, show

app = typer.Typer()
COMPARED: dict[str, Callable[[Any], str]] = {
    "version": str,
    "recipe": str,
    "wins": str,
    "ties": str,
    "losses": str,
    "win_rate": "{:.0%}".format,
    "interval": lambda bounds: f"{bounds[0]:.0%}–{bounds[1]:.0%}",
    "rewards/chosen": "{:+.3f}".format,
    "rewards/margins": "{:+.3f}".format,
    "perplexity/chosen": "{:.2f}".format,
    "perplexity/prose": "{:.2f}".format,
    "words": "{:.0f}".format,
    "repetition": "{:.0%}".format,
}


@app.command()
def evaluate(
    version: Annotated[str, typer.Argument(help="The version to judge.")],
    against: Annotated[str | None, typer.Option(help="The version to compare with (default: the champion).")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="mt-bench, alpaca-eval, ifeval, or a file of prompts; see ZLOOP_JUDGE_URL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Benchmark: so many questions, of all categories.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=8192, help="Benchmark: tokens of an answer at most.")] = 512,
    as_json: Json = False,
) -> None:
    """Judge a version against another on held-out pairs, or by a benchmark (which needs no other version)."""
    if benchmark is None:
        with connected(as_json) as client:
            result = client.request("POST", "/v1/evaluations", {"version": version, "against": against})
        said = result["verdict"]["reasons"]
    else:
        asked = {"limit": limit, "version": version, "against": against, "max_tokens": max_tokens}
        with connected(as_json) as client, readable(benchmark, as_json) as asked["benchmark"]:
            result = client.request("POST", "/v1/benchmarks", asked)
        said = [*result["sentences"], *(line for one in result["tables"] for line in _table(one))]
    report = [f"Report: {result['report']}"] if result["report"] else []
    show(result, as_json, "\n".join([*said, *report]))


def _table(table: dict[str, Any]) -> list[str]:
    """A benchmark's table for a terminal."""
    cells = [
        [cell if isinstance(cell, str) else "–" if cell is None else f"{cell:.4g}" for cell in row]
        for row in (table["head"], *table["rows"])
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["", table["title"]] + [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


@app.command()
def compare(
    versions: Annotated[list[str], typer.Argument(help="The versions to judge against the base, such as v1 v2.")],
    as_json: Json = False,
) -> None:
    """With training against without: each version against the base, in one table. Takes minutes for each."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/comparisons", {"versions": versions})
    rows = [[COMPARED[key](row[key]) if row[key] is not None else "–" for key in COMPARED] for row in result["rows"]]
    widths = [max(map(len, column)) for column in zip(COMPARED, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (COMPARED, *rows)]
    show(result, as_json, "\n".join(line.rstrip() for line in lines))
