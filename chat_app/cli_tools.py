"""What every command does alike: find the settings, reach the API, show a result, refuse with a sentence.

Used by `cli.py` and `data_cli.py`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from chat_app.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from chat_app.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def settings(as_json: bool = False) -> Settings:
    """The settings; a sentence and exit code 1 where they are wrong."""
    try:
        return load_settings()
    except SettingsError as error:
        refuse(str(error), as_json)


@contextmanager
def connected(as_json: bool, *, with_trainer: bool = False) -> "Iterator[Client]":
    """A way to the API; what it refuses becomes a sentence and exit code 1."""
    import httpx

    from chat_app.client import ApiRefused, connect
    from feedback_store.errors import StoreError

    try:
        with connect(settings(as_json), with_trainer=with_trainer) as client:
            yield client
    except ApiRefused as error:
        refuse(str(error), as_json, error.body)
    except (StoreError, SettingsError) as error:
        refuse(str(error), as_json)
    except httpx.HTTPError as error:
        refuse(f"The server did not answer ({type(error).__name__}). Try again, or look at its log.", as_json)


@contextmanager
def readable(given: str, as_json: bool) -> "Iterator[str]":
    """What a request may call a file of the person's: a copy that the server can read; all else is as it was given."""
    from chat_app.named_folders import NamedFolders, lent

    path = Path(given).expanduser()
    chosen = settings(as_json)
    if not path.is_file():
        yield given
        return
    if NamedFolders(chosen.import_folders).file(str(path.absolute())):
        yield str(path.absolute())
        return
    try:
        with lent(chosen.data_dir, path) as copy:
            yield str(copy)
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror or error}). Look at its rights, and at the disk.", as_json)


def show(body: dict[str, Any], as_json: bool, text: str, stream: Any = None) -> None:
    """Print the body as JSON, or the text."""
    typer.echo(json.dumps(body) if as_json else text, file=stream)


def printable(text: str) -> str:
    """A name that somebody else chose, as a terminal may show it: no line ends, no control characters."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def refuse(message: str, as_json: bool, body: dict[str, Any] | None = None, *, silent: bool = False) -> NoReturn:
    """Say why not, and exit with 1."""
    if as_json and not silent:
        typer.echo(json.dumps(body or {"error": {"type": "refused", "message": message}}))
    typer.echo(f"zloop: {message}", err=True)
    raise typer.Exit(1)
