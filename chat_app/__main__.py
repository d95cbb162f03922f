"""The composition root: settings → store → trainer → slot → API and pages → server. `zloop serve` runs it.

The one place of chat_app (with `cli.py`) that knows the trainer. Everything it builds is handed on; nothing is global.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import trainer.errors as refusals
from chat_app.client import announce, find_server, withdraw
from chat_app.operations import Operations
from chat_app.serving.engine import Canary, Engine, EngineError, EngineStartFailed, ServedVersion
from chat_app.settings import Settings, SettingsError, load_settings
from feedback_store import snapshots
from feedback_store.backup import list_backups, verify_backup
from feedback_store.errors import StoreError
from feedback_store.evaluation_prompts import FOLDER, load_evaluation_prompts
from feedback_store.mixing import Mix
from feedback_store.records import BASE_VERSION
from feedback_store.store import FeedbackStore
from trainer import schedule
from trainer.base_model import BaseModel, embedded, ensure_base
from trainer.recipe import DEFAULT, PRACTICE, load_recipe, recipe_names
from trainer.runs import Run
from trainer.served_model import ensure_served
from trainer.supervisor import Supervisor
from trainer.verdict import decide

if TYPE_CHECKING:
    from chat_app.serving.remote_engine import RemoteBuilder

TRAINER_STATUSES: Mapping[type[Exception], int] = {
    refusals.UnknownRecipe: 404,
    refusals.BadRecipe: 400,
    refusals.BadRunRequest: 400,
    refusals.RunActive: 409,
    refusals.RunNotFound: 404,
    refusals.VersionNotFound: 404,
    refusals.VersionDamaged: 409,
    refusals.TrainingUnavailable: 503,
    refusals.BaseModelMissing: 503,
    refusals.TrainerError: 500,
}


ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
ZEPHYR_GPU_BYTES = 20 * 10**9  # 14.5 GB of weights in bf16, keys and values, and what a forward needs
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")


class CannotServe(Exception):
    """The server cannot start; the message says why and what to do."""


class TrainerRoom:
    """The trainer as `Operations` sees it: the supervisor, the versions on disk, the base."""

    def __init__(self, settings: Settings, store: FeedbackStore) -> None:
        self._settings = settings
        self._store = store
        self._base = base_model(settings)
        self.supervisor = Supervisor(settings.data_dir, self._base, partial(freeze, settings, store), store.champion)

    @cached_property
    def _served_gguf(self) -> Path | None:
        """The base as the native engine reads it: the embedded one in the form that answers fastest."""
        if self._settings.engine != "llama" or self._settings.model != "auto":
            return self._base.gguf
        return ensure_served(self._base, self._settings.data_dir / "models")

    def start_run(self, **request: Any) -> Run:
        return self.supervisor.start_run(**request)

    def cancel(self, run_id: str) -> Run:
        return self.supervisor.cancel(run_id)

    def run(self, run_id: str) -> Run:
        return self.supervisor.run(run_id)

    def runs(self) -> Sequence[Run]:
        return self.supervisor.runs()

    def recipes(self) -> Sequence[str]:
        """The recipes for real preferences, the default first."""
        return sorted(set(recipe_names()) - {PRACTICE}, key=lambda name: name != DEFAULT)

    def snapshot(self, recipe: str | None) -> snapshots.Snapshot:
        """Freeze the present preferences as a recipe (the default one for None) mixes them."""
        return freeze(self._settings, self._store, None, load_recipe(recipe or DEFAULT).mix(seed=0))

    def manifests(self) -> Sequence[Mapping[str, Any]]:
        """The base as `v0`, then every published version, oldest first."""
        base = {"version": BASE_VERSION, "base": self._base.name, "snapshot": None, "run_id": None, "created_at": None}
        versions = self.supervisor.versions
        published = [asdict(versions.load(name)) for name in versions.names()]
        return [base, *published]

    def served(self, version: str) -> ServedVersion:
        """What the engine needs to serve `version`, its files verified. Raises VersionDamaged, VersionNotFound.

        In both forms where both are there; a directory that is still to be converted or downloaded is the builder's.
        """
        directory = None if self._base.directory is None else str(self._base.directory)
        base = ServedVersion(version, base_gguf=self._served_gguf, base_model=directory)
        if version == BASE_VERSION:
            return base
        versions = self.supervisor.versions
        versions.verify(version)
        return replace(
            base,
            adapter_gguf=versions.adapter_gguf(version),
            adapter_directory=versions.adapter_directory(version),
            canaries=tuple(
                Canary(tuple(one["messages"]), one["begins"], one["prompt"]) for one in versions.canaries(version)
            ),
        )

    def evaluate(self, version: str, against: str) -> dict[str, Any]:
        evaluation = self.supervisor.evaluate(version, against)
        return {
            "version": version,
            "against": against,
            "evaluation": {key: value for key, value in evaluation.items() if key not in ("results", "canaries")},
            "verdict": decide(evaluation, against, version).as_dict(),
        }


def base_model(settings: Settings) -> BaseModel:
    """The base named by ZLOOP_MODEL: the same for every command on this machine. Raises CannotServe."""
    if settings.model == "auto":
        return _of_the_hub(ZEPHYR) if settings.engine == "transformers" and _gpu_holds_zephyr() else embedded()
    path = Path(settings.model).expanduser().absolute()
    if path.is_file() and path.suffix == ".gguf":
        return BaseModel(name=path.stem.lower(), gguf=path)
    if settings.engine == "llama":
        raise CannotServe(
            f"ZLOOP_MODEL={settings.model!r}: the engine `llama` serves GGUF files, and there is none at {path}. Use "
            "`auto` for the embedded model, the path of a .gguf file of the Llama family, or ZLOOP_ENGINE=transformers."
        )
    if (path / "config.json").is_file():
        return BaseModel(name=path.name.lower(), directory=path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.model) and not path.exists():
        return _of_the_hub(settings.model)
    if settings.engine == "remote":  # a name that only the server knows: chatting needs no weights here
        name = settings.model.strip("/").replace("/", "--").lower()
        return BaseModel(name, directory=settings.data_dir / "models" / name)
    raise CannotServe(
        f"ZLOOP_MODEL={settings.model!r} is no GGUF file, no directory with a config.json and no hub id (owner/name)."
    )


def _of_the_hub(hub_id: str) -> BaseModel:
    return BaseModel(name=hub_id.replace("/", "--").lower(), hub_id=hub_id)


def _gpu_holds_zephyr() -> bool:
    """By all memory of the GPU, not by what is free now: versions belong to a base, it must not change by the hour."""
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= ZEPHYR_GPU_BYTES)


def freeze(settings: Settings, store: FeedbackStore, practice_taste: str | None, mix: Mix) -> snapshots.Snapshot:
    """Freeze the present preferences, real ones as the mix says, or those of a practice taste."""
    with store.freezing:
        return snapshots.freeze(
            store.training_rows(practice_taste),
            settings.data_dir / "snapshots",
            practice_taste,
            mix,
            evaluation_prompts=load_evaluation_prompts(settings.data_dir / FOLDER),
            redact=settings.redact,
        )


def engine_builder(settings: Settings) -> Callable[[ServedVersion], Awaitable[Engine]]:
    """The builder of the engine named by ZLOOP_ENGINE."""
    if settings.engine == "scripted":
        from chat_app.serving.scripted_engine import build_scripted_engine

        return partial(build_scripted_engine, delay_s=settings.scripted_delay_s)
    if settings.engine == "transformers":
        return _transformers_builder(settings)
    if settings.engine == "remote":
        builder = remote_builder(settings)
        try:
            asyncio.run(builder.configure())  # what cannot be served is said now, not at the first promotion
        except EngineError as error:
            raise CannotServe(f"ZLOOP_ENGINE=remote: {error}.") from error
        return builder
    if find_spec("xllamacpp") is None:
        raise CannotServe("The native engine (xllamacpp) is not installed. Run `make setup`.")
    from chat_app.serving.llama_engine import build_llama_engine

    return partial(build_llama_engine, log_dir=settings.data_dir / "logs")


def remote_builder(settings: Settings) -> "RemoteBuilder":
    """The servers of ZLOOP_REMOTE_URL with everything the settings say about them; not asked anything yet."""
    from chat_app.serving.deadlines import Timeouts
    from chat_app.serving.remote_engine import RemoteBuilder
    from chat_app.serving.upstream import Upstream

    assert settings.remote_url is not None
    key = "" if settings.remote_key is None else settings.remote_key.get_secret_value()
    kind = None if settings.remote_kind == "auto" else settings.remote_kind
    timeouts = Timeouts(*map(float, settings.remote_timeouts_s.split(",")))
    root = settings.remote_adapter_dir
    return RemoteBuilder(
        [Upstream(url.strip(), key=key, kind=kind, timeouts=timeouts) for url in settings.remote_url.split(",")],
        base=None if settings.model == "auto" else settings.model,
        adapter_root=None if root is None else PurePosixPath(root),
        owner=hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:8],
    )


def _transformers_builder(settings: Settings) -> Callable[[ServedVersion], Awaitable[Engine]]:
    """Versions on one base in this process; the base is converted or downloaded first, where it has to be."""
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise CannotServe(f"The engine `transformers` needs {' and '.join(missing)}. Run `make setup`.")
    from chat_app.serving.transformers_engine import TransformersEngines

    base, models_dir = base_model(settings), settings.data_dir / "models"
    engines = TransformersEngines(precision=settings.precision)

    async def build(served: ServedVersion) -> Engine:
        try:
            directory = await asyncio.to_thread(ensure_base, base, models_dir)
        except refusals.BaseModelMissing as error:
            raise EngineStartFailed(str(error)) from error
        return await engines.build(replace(served, base_model=str(directory)))

    return build


def open_store(settings: Settings) -> FeedbackStore:
    """Open the data directory's store. Raises CannotServe or StoreError with what is wrong."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotServe(
            f"The data directory {settings.data_dir} cannot be made or used ({error.strerror}). "
            "Set ZLOOP_DATA_DIR to a directory you can write to."
        ) from error
    return FeedbackStore.open(settings.data_dir / "store.duckdb")


@contextmanager
def compose(settings: Settings, *, with_trainer: bool) -> Iterator[Any]:
    """The API on the data directory without a served model, for commands where no server runs."""
    from chat_app.api import create_api

    _keep_to_ourselves()
    with open_store(settings) as store:
        room = TrainerRoom(settings, store)
        if with_trainer:
            room.supervisor.start()
        try:
            yield create_api(Operations(settings, store, room, None, schedule.is_due), TRAINER_STATUSES)
        finally:
            room.supervisor.stop()


def _keep_to_ourselves() -> None:
    """No library reports home."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")


def serve(settings: Settings, *, as_json: bool = False) -> None:
    """Serve until interrupted; answers that were begun are finished first. Raises CannotServe."""
    from chat_app.server import Server

    _keep_to_ourselves()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore", "httpx2", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    url = f"http://{settings.host}:{settings.port}"
    running = find_server(settings.data_dir)
    if running is not None:
        raise CannotServe(f"A server with the data directory {settings.data_dir} runs already: {running.url}")
    try:
        with _listening(settings) as listener, open_store(settings) as store:
            failures: list[Exception] = []

            def give_up(error: Exception) -> None:
                failures.append(error)
                server.should_exit = True

            app = create_application(settings, store, lambda: _announce(settings, url, as_json), give_up)
            server = Server(app, app.state.operations.drain)
            server.run(sockets=[listener])
            if failures:
                raise CannotServe(f"The server could not start: {failures[0]}") from failures[0]
            if server.force_exit:
                sys.exit("zloop: stopped at once; answers that were being written are lost.")
    except (StoreError, SettingsError) as error:
        raise CannotServe(str(error)) from error
    except refusals.BaseModelMissing as error:
        raise CannotServe(str(error)) from error
    finally:
        withdraw(settings.data_dir)


def create_application(
    settings: Settings, store: FeedbackStore, on_ready: Callable[[], None], on_failure: Callable[[Exception], None]
) -> Any:
    """API and pages in one FastAPI application; its lifespan brings up the engine and the trainer.

    The application answers before the engine does, so that probes read why it is not ready. `on_failure` is told where
    nothing can be served at all.
    """
    from fastapi import FastAPI
    from fastapi.responses import RedirectResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from chat_app.api import create_api
    from chat_app.metrics import Metrics
    from chat_app.serving.slot import ModelSlot
    from chat_app.ui.mount import mount_pages

    room = TrainerRoom(settings, store)
    metrics = Metrics()
    slot = ModelSlot(metrics.counting(engine_builder(settings)), keep_warm=settings.keep_warm)
    operations = Operations(settings, store, room, slot, schedule.is_due, metrics=metrics)

    async def start() -> None:
        try:
            await operations.start_serving()
            on_ready()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server must end and say why
            on_failure(error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(operations.data.finish_erasures)
        await asyncio.to_thread(room.supervisor.start)
        starting = asyncio.create_task(start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.to_thread(room.supervisor.stop)
            await operations.close()

    app = create_api(operations, TRAINER_STATUSES, lifespan=lifespan)
    app.state.operations = operations
    # Without accounts, a page elsewhere must not reach this server through a name that resolves to loopback.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, settings.host], www_redirect=False)
    app.add_api_route("/admin", lambda: RedirectResponse("/admin/"), include_in_schema=False)
    return mount_pages(app, operations, (refusals.TrainerError,))


def _announce(settings: Settings, url: str, as_json: bool) -> None:
    announce(settings.data_dir, url)
    print(json.dumps({"url": url}) if as_json else f"\nZephyr Loop answers at {url}   (Ctrl-C stops it)\n", flush=True)


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise CannotServe(
                f"Port {settings.port} on {settings.host} cannot be used ({error.strerror}). "
                f"Stop what listens there, or choose another: ZLOOP_PORT={settings.port + 1} make run"
            ) from error
        yield listener


def verify_all(settings: Settings) -> tuple[list[str], list[str]]:
    """Re-derive the hashes of every snapshot, version and backup: (sentences about what is wrong, names checked)."""
    from trainer.versions import Versions

    problems: list[str] = []
    checked: list[str] = []
    for manifest in sorted((settings.data_dir / "snapshots").glob("*/manifest.json")):
        checked.append(f"snapshot {manifest.parent.name}")
        try:
            snapshots.verify(snapshots.load_snapshot(manifest.parent))
        except StoreError as error:
            problems.append(str(error))
    versions = Versions(settings.data_dir / "versions")
    for name in versions.names():
        checked.append(f"version {name}")
        try:
            versions.verify(name)
        except refusals.TrainerError as error:
            problems.append(str(error))
    for backup in list_backups(settings.data_dir / "backups"):
        checked.append(f"backup {backup.path.name}")
        try:
            verify_backup(backup.path)
        except StoreError as error:
            problems.append(str(error))
    return problems, checked


def diagnose(settings: Settings) -> list[dict[str, Any]]:
    """What is here and what is missing, for `zloop doctor`."""
    findings: list[dict[str, Any]] = []

    def note(what: str, ok: bool, detail: str) -> None:
        findings.append({"what": what, "ok": ok, "detail": detail})

    note("python", sys.version_info >= (3, 11), sys.version.split()[0])
    try:
        base = base_model(settings)
        note("model", True, f"{base.name} ({base.gguf or base.directory or base.hub_id})")
    except (CannotServe, refusals.TrainerError) as error:
        note("model", False, str(error))
    if settings.engine == "remote":
        builder = remote_builder(settings)
        try:
            limits = asyncio.run(builder.inspect())
            note("model server", True, "; ".join([str(settings.remote_url), *limits]))
        except EngineError as error:
            note("model server", False, str(error))
    for package, use in (("xllamacpp", "chat"), ("torch", "training"), ("trl", "training"), ("gguf", "training")):
        found = find_spec(package) is not None
        note(package, found, f"for {use}" + ("" if found else ": not installed; run `make setup`"))
    server = find_server(settings.data_dir)
    if server is not None:
        note("server", True, f"runs at {server.url} (process {server.pid})")
        return findings
    try:
        with open_store(settings) as store:
            counts = store.counts()
        note("data directory", True, f"{settings.data_dir}: {counts.picks} picks")
    except (CannotServe, StoreError) as error:
        note("data directory", False, str(error))
    try:
        with _listening(settings):
            note("port", True, f"{settings.port} is free")
    except CannotServe as error:
        note("port", False, str(error))
    return findings


if __name__ == "__main__":
    try:
        serve(load_settings())
    except (CannotServe, SettingsError) as problem:
        sys.exit(f"zloop: {problem}")
