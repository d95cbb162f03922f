"""The settings: one table of name, default, one sentence and check, which feeds code, `--help` and the README.

Where it sits: the composition root (`__main__.py`, `cli.py`) calls `load_settings` once; everyone else is handed the
frozen result. Nothing else reads the environment.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

PREFIX = "ZLOOP_"


class SettingsError(Exception):
    """A setting that cannot be used; the message names it, its value and what to do."""


class Settings(BaseModel):
    """Every setting of the product; each is the environment variable `ZLOOP_<NAME>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Annotated[Path, Field(description="Where conversations, picks, runs and versions are kept.")] = Path(
        "data"
    )
    host: Annotated[str, Field(description="Address to listen on; only loopback until accounts exist.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, description="Port to listen on.")] = 7860
    engine: Annotated[
        Literal["llama", "transformers", "scripted"],
        Field(description="What answers: `llama` (native), `transformers` (in process, GPU) or `scripted` (no model)."),
    ] = "llama"
    model: Annotated[
        str,
        Field(
            min_length=1,
            description="The base model: `auto` or a GGUF file; for `transformers` also a directory or hub id.",
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="How `transformers` computes: `auto` is bf16 on a GPU and fp32 on a CPU."),
    ] = "auto"
    retrain_every: Annotated[
        int,
        Field(
            ge=0,
            description="Start a retrain by itself after this many new preferences from picks; 0: only when asked.",
        ),
    ] = 50
    redact: Annotated[
        bool, Field(description="Hide e-mail addresses, phone numbers and keys on the way into a snapshot.")
    ] = True
    keep_backups_days: Annotated[
        int, Field(ge=1, le=3650, description="Days a backup is kept; the newest three are kept however old they are.")
    ] = 30
    max_tokens: Annotated[
        int, Field(ge=1, le=8192, description="Longest answer, in tokens, where a request names none.")
    ] = 1024
    temperature: Annotated[float, Field(ge=0, le=2, description="Sampling temperature where a request names none.")] = (
        0.5
    )
    compare_share: Annotated[
        float, Field(ge=0, le=1, description="Share of turns that show two answers when Compare is `sometimes`.")
    ] = 0.25
    scripted_delay_s: Annotated[
        float, Field(ge=0, le=10, description="Seconds between two words of the `scripted` engine.")
    ] = 0.0

    @field_validator("host")
    @classmethod
    def _only_loopback(cls, host: str) -> str:
        if host == "localhost":
            return host
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(
                "is not a loopback address. Accounts do not exist yet, so the server is for this machine only: "
                "use 127.0.0.1, and an SSH tunnel to reach it from elsewhere"
            )
        return host


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environment` (default: the process environment), once.

    Raises `SettingsError` for an unknown `ZLOOP_` variable or a value that fails its check.
    """
    environment = os.environ if environment is None else environment
    given = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    unknown = sorted(set(given) - known)
    if unknown:
        raise SettingsError(f"Unknown setting {', '.join(unknown)}. The settings are: {', '.join(sorted(known))}.")
    values = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(" ".join(_sentence(detail) for detail in error.errors())) from None
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser().absolute()})


def _sentence(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    name = str(location[0]) if isinstance(location, tuple) and location else "?"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{PREFIX}{name.upper()}={detail['input']!r}: {message[0].lower()}{message[1:]}."


def settings_table() -> list[tuple[str, str, str]]:
    """Rows of (environment variable, default, sentence), for `zloop serve --help` and the README."""
    return [
        (PREFIX + name.upper(), str(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
