"""The settings: one table of name, default, one sentence and check, which feeds code, `--help` and the README.

Where it sits: the composition root (`__main__.py`, `cli.py`) calls `load_settings` once; everyone else is handed the
frozen result. Nothing else reads the environment.
"""

import ipaddress
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

PREFIX = "ZLOOP_"
MAY_HOLD_A_SECRET = (
    "remote_key",
    "remote_url",
    "judge_token",
    "judge_url",
)  # a refused URL may be refused for the password in it


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
        Literal["llama", "transformers", "remote", "scripted"],
        Field(
            description=(
                "`llama` (native), `transformers` (in process, GPU), `remote` (vLLM, TGI …), `scripted` (no model)."
            )
        ),
    ] = "llama"
    model: Annotated[
        str,
        Field(
            min_length=1,
            description="The base: `auto`, or a GGUF file; for `transformers`, `remote` also a directory or hub id.",
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="How `transformers` computes: `auto` is bf16 on a GPU and fp32 on a CPU."),
    ] = "auto"
    keep_warm: Annotated[
        bool, Field(description="Keep the engine of the champion before, so that a rollback takes no time.")
    ] = True
    baking: Annotated[
        Literal["on", "off"],
        Field(description="Watch a version after its promotion, and go back by itself where it is clearly worse."),
    ] = "on"
    baking_requests: Annotated[
        int, Field(ge=5, le=10_000, description="Answers for which a new champion is watched, at least.")
    ] = 50
    baking_s: Annotated[
        float, Field(ge=0, le=86_400, description="Seconds for which a new champion is watched, at least.")
    ] = 60.0
    policy: Annotated[
        Literal["manual", "propose", "auto"],
        Field(description="A version judged better: left to people, `propose`d to them, or promoted (`auto`)."),
    ] = "manual"
    approval: Annotated[
        Literal["off", "other"],
        Field(
            description="`other`: only somebody else than who started its run promotes a version; names are asked for."
        ),
    ] = "off"
    remote_url: Annotated[
        str | None, Field(description="`remote`: URL of the model server; two, with a comma, for blue/green.")
    ] = None
    remote_key: Annotated[SecretStr | None, Field(description="`remote`: the model server's API key.")] = None
    remote_kind: Annotated[
        Literal["auto", "vllm", "tgi", "openai"],
        Field(description="`remote`: what the model server is; `auto` asks it."),
    ] = "auto"
    remote_adapter_dir: Annotated[
        str | None,
        Field(description="`remote`: where vLLM sees the directory `versions`; None: at the same path as here."),
    ] = None
    remote_timeouts_s: Annotated[
        str,
        Field(
            pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){3}$",
            description="`remote`: seconds to connect, to the first token, between tokens, for a whole answer.",
        ),
    ] = "5,120,60,900"
    judge_url: Annotated[
        str | None, Field(description="Benchmarks: URL of the OpenAI-compatible server whose model judges answers.")
    ] = None
    judge_model: Annotated[str | None, Field(description="Benchmarks: the judging model's name on that server.")] = None
    judge_token: Annotated[SecretStr | None, Field(description="Benchmarks: that server's API key.")] = None
    import_dirs: Annotated[
        str,
        Field(
            description="Folders whose files a request may import by name, with a colon between; empty: `imports` in "
            "the data directory."
        ),
    ] = ""
    retrain_every: Annotated[
        int,
        Field(
            ge=0,
            description="Start a retrain by itself after this many new preferences from picks; 0: only when asked.",
        ),
    ] = 50
    trackers: Annotated[
        str,
        Field(
            pattern=r"^((tensorboard|trackio)(,(tensorboard|trackio))*)?$",
            description="Where runs are drawn too: `tensorboard`, `trackio`, or both with a comma (extras to install).",
        ),
    ] = ""
    launcher: Annotated[
        Literal["local", "slurm", "ray"],
        Field(description="What starts a training: this machine, or a Slurm or Ray cluster that shares its files."),
    ] = "local"
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp2", "zero3"],
        Field(description="Several processes: `ddp`; `fsdp2` or `zero3` shard the model over GPUs; `auto` is `ddp`."),
    ] = "auto"
    slurm_options: Annotated[
        str, Field(description="`slurm`: more options for `sbatch`, such as `--partition=gpu --time=12:00:00`.")
    ] = ""
    ray_address: Annotated[
        str, Field(pattern=r"^https?://[^/@\s]+$", description="`ray`: URL of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265"
    retrain_cron: Annotated[
        str | None, Field(description="Start a retrain at these times: five cron fields, such as `0 2 * * *`.")
    ] = None
    retrain_at_least: Annotated[
        int, Field(ge=0, description="New preferences that a time of `ZLOOP_RETRAIN_CRON` needs; else it is skipped.")
    ] = 1
    quiet_hours: Annotated[
        str | None, Field(description="No retrain starts by itself in these hours, such as `08:00-18:00`.")
    ] = None
    time_zone: Annotated[
        str,
        Field(min_length=1, description="Of the times above, such as `Europe/Berlin`; `local`: this machine's."),
    ] = "local"
    device_policy: Annotated[
        Literal["auto", "share", "pause", "refuse"],
        Field(
            description="Where a run may not fit beside the served model: `share`, `pause` chat, or `refuse` the run."
        ),
    ] = "auto"
    redact: Annotated[
        bool, Field(description="Hide e-mail addresses, phone numbers and keys on the way into a snapshot.")
    ] = True
    keep_backups_days: Annotated[
        int, Field(ge=1, le=3650, description="Days a backup is kept; the newest three are kept however old they are.")
    ] = 30
    max_tokens: Annotated[
        int, Field(ge=1, le=8192, description="Longest answer, in tokens, where a request names none.")
    ] = 1024
    max_answers: Annotated[
        int, Field(ge=2, le=1024, description="Answers written at once; the embedded engine has room for 8.")
    ] = 8
    max_answers_per_user: Annotated[
        int, Field(ge=2, le=1024, description="Answers written at once for one user; two answers to compare are two.")
    ] = 4
    max_waiting: Annotated[
        int, Field(ge=1, le=100_000, description="Requests that wait for their turn; more are asked to come back.")
    ] = 64
    tokens_per_minute: Annotated[
        int, Field(ge=0, description="Tokens a user may spend a minute, prompts and answers together; 0: no limit.")
    ] = 0
    shutdown_s: Annotated[
        float, Field(ge=0, le=3600, description="Seconds a stopping server gives the answers it has begun.")
    ] = 30.0
    temperature: Annotated[float, Field(ge=0, le=2, description="Sampling temperature where a request names none.")] = (
        0.5
    )
    system_prompt: Annotated[
        str,
        Field(
            max_length=20_000,
            description="What the model is told before every conversation; empty: what its chat template says.",
        ),
    ] = ""
    compare_share: Annotated[
        float, Field(ge=0, le=1, description="Share of turns that show two answers when Compare is `sometimes`.")
    ] = 0.25
    trial_share: Annotated[
        float, Field(gt=0, le=1, description="Share of pairs that show the challenger while a live trial runs.")
    ] = 0.5
    trial_max_votes: Annotated[
        int, Field(ge=1, le=100_000, description="Votes after which a live trial ends undecided.")
    ] = 1000
    gold_share: Annotated[
        float, Field(ge=0, le=1, description="Share of the pairs on the page *Rate* that are gold pairs.")
    ] = 0.2
    scripted_delay_s: Annotated[
        float, Field(ge=0, le=10, description="Seconds between two words of the `scripted` engine.")
    ] = 0.0

    @property
    def import_folders(self) -> list[Path]:
        """The folders whose files may be imported by name."""
        named = [Path(one).expanduser().absolute() for one in self.import_dirs.split(os.pathsep) if one.strip()]
        return named or [self.data_dir / "imports"]

    @property
    def launcher_options(self) -> dict[str, str]:
        """What each launcher needs besides, by its name."""
        return {"slurm": self.slurm_options, "ray": self.ray_address}

    @field_validator("retrain_cron", "quiet_hours", "judge_model")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return (value or "").strip() or None

    @field_validator("remote_url", "judge_url")
    @classmethod
    def _only_plain_urls(cls, urls: str | None) -> str | None:
        for url in () if urls is None else urls.split(","):
            parts = urlsplit(url.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("every URL must begin with http:// or https:// and name a host")
            if parts.port == 0:  # asking for it refuses what is no port
                raise ValueError("the port must be from 1 to 65535")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError(
                    "must hold no user, password, query or fragment: "
                    "the key goes into ZLOOP_REMOTE_KEY, a judge's into ZLOOP_JUDGE_TOKEN"
                )
        return urls

    @field_validator("slurm_options")
    @classmethod
    def _only_options(cls, options: str) -> str:
        words = shlex.split(options)  # raises ValueError for an open quotation mark
        if any(not word.startswith("-") for word in words):
            raise ValueError("every option must begin with - and hold its value after =, such as --partition=gpu")
        return options

    @field_validator("remote_key", "judge_token")
    @classmethod
    def _only_header_text(cls, key: SecretStr | None) -> SecretStr | None:
        text = "" if key is None else key.get_secret_value().strip()
        if not text.isascii() or not text.isprintable():
            raise ValueError("must be printable ASCII: nothing else can be sent in a header")
        return SecretStr(text) if text else None

    @model_validator(mode="after")
    def _remote_needs_a_url(self) -> Self:
        if self.engine == "remote" and self.remote_url is None:
            raise ValueError("ZLOOP_ENGINE=remote needs ZLOOP_REMOTE_URL, the model server's URL")
        return self

    @model_validator(mode="after")
    def _a_judge_is_a_url_and_a_model(self) -> Self:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("ZLOOP_JUDGE_URL and ZLOOP_JUDGE_MODEL name a judge together: set both or none")
        if self.judge_url is not None and "," in self.judge_url:
            raise ValueError("ZLOOP_JUDGE_URL must be one URL")
        return self

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
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not isinstance(location, tuple) or not location:
        return f"{message}."  # of several settings together
    name = str(location[0])
    given = "(not shown)" if name in MAY_HOLD_A_SECRET else repr(detail["input"])
    return f"{PREFIX}{name.upper()}={given}: {message[0].lower()}{message[1:]}."


def settings_table() -> list[tuple[str, str, str]]:
    """Rows of (environment variable, default, sentence), for `zloop serve --help` and the README."""
    return [
        (PREFIX + name.upper(), str(field.default), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
