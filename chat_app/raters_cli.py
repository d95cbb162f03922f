"""The commands about raters: `zloop raters`, `zloop quarantine`, `zloop gold`.

Where it sits: beside `cli.py`, which takes them in. Each is one request to the API.
"""

from typing import Annotated, Any

import typer

from chat_app.cli_tools import Json, connected, printable, show

app = typer.Typer()
GOLD_CHARACTERS = 60


@app.command()
def raters(as_json: Json = False) -> None:
    """On whom one can rely: picks, agreement, gold pairs, habits, and who looks suspicious."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/raters")
    lines = [printable(result["sentence"])]
    for row in result["raters"]:
        lines.append(f"{printable(row['rater']):<20} {row['state']:<11} {line_of(row)}")
        lines += [f"  ! {sentence}" for sentence in row["suspicions"]]
        if row["reason"]:
            lines.append(f"  in quarantine since {row['since'][:10]}: {row['reason']}")
    show(result, as_json, "\n".join(lines))


@app.command()
def quarantine(
    rater: Annotated[str, typer.Argument(help="Whose words are to teach nothing from now on.")],
    reason: Annotated[str, typer.Option(help="Why; kept with it.")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Let their words teach again.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a rater's words, and learn nothing from them from now on."""
    with connected(as_json) as client:
        result = client.request("POST", "/v1/quarantine", {"rater": rater, "lift": lift, "reason": reason})
    label = printable(result["rater"])
    said = f"{label} may teach again." if lift else (
        f"{label} is in quarantine: no new snapshot takes their words. What versions learned from them stays until you "
        "retrain."
    )  # fmt: skip
    show(result, as_json, said)


@app.command()
def gold(as_json: Json = False) -> None:
    """List the gold pairs, and how raters did on each."""
    with connected(as_json) as client:
        result = client.request("GET", "/v1/gold")
    lines = [
        f"{row['right']:>4} of {row['answered']:<4} right: {' '.join(row['prompt'].split())[:GOLD_CHARACTERS]}"
        for row in result["pairs"]
    ]
    none = f"There are no gold pairs. Write some into {result['file']}: a line each, with prompt, chosen and rejected."
    show(result, as_json, "\n".join(lines) or none)


def line_of(row: dict[str, Any]) -> str:
    """What is known of a rater, in one line."""
    parts = [f"{row['picks']} picks", f"{row['next_share']:.0%} of the next snapshot", f"weight {row['weight']:.2f}"]
    for name, key in (("agrees with others", "agreement"), ("gold", "gold"), ("first answer", "first")):
        found = row[key]
        if found["of"]:
            low, high = found["interval"]
            parts.append(f"{name} {found['count']} of {found['of']} ({low:.0%}–{high:.0%})")
    if row["median_s"] is not None:
        parts.append(f"{row['median_s']:.1f} s a pick")
    effect = row["effect"]
    if effect is not None:
        parts.append(
            f"without them {effect['wins_without']}:{effect['losses_without']}, p {effect['p_value_without']:.2g}"
        )
    return ", ".join(parts)
