"""The composition root: settings → store → trainer → slot → API and pages → server. `zloop serve` runs it.

With `engines.py`, `trainer_room.py` and `cli.py` the one place of chat_app that knows the trainer. Everything it builds
is handed on; nothing is global.
"""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trainer.errors as refusals
from chat_app.client import announce, find_server, withdraw
from chat_app.engines import CannotServe, base_model, engine_builder, remote_builder
from chat_app.log_lines import Aside, write_log_lines
from chat_app.named_folders import UPLOADS
from chat_app.operations import Operations
from chat_app.serving.engine import EngineError
from chat_app.settings import Settings, SettingsError, load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store import snapshots
from feedback_store.backup import files_of, list_backups, verify_backup
from feedback_store.errors import StoreError
from feedback_store.private_files import new_files_private, tighten
from feedback_store.store import FeedbackStore
from feedback_store.unlisted import strangers, unlisted
from trainer import schedule
from trainer.command import Launch
from trainer.launchers import launcher_for
from trainer.supervisor import pause_of

TRAINER_STATUSES: Mapping[type[Exception], int] = {
    refusals.UnknownRecipe: 404,
    refusals.BadRecipe: 400,
    refusals.BadRunRequest: 400,
    refusals.EvaluationNotFound: 404,
    refusals.JudgeFailed: 503,
    refusals.BadSchedule: 422,
    refusals.NotEnoughMemory: 409,
    refusals.RunActive: 409,
    refusals.RunNotFound: 404,
    refusals.VersionNotFound: 404,
    refusals.VersionDamaged: 409,
    refusals.TrainingUnavailable: 503,
    refusals.BaseModelMissing: 503,
    refusals.LaunchFailed: 503,
    refusals.NotEnoughDisk: 503,
    refusals.TrainerError: 500,
}


SWITCH_S = 0.001
"""An import computes for minutes: how long a pick waits for its turn, each time that it needs one; 5 ms by default."""
SWEEP_EVERY_S = 600.0
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


def open_store(settings: Settings) -> FeedbackStore:
    """Open the data directory's store. Raises CannotServe or StoreError with what is wrong."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        (settings.data_dir / "imports").mkdir(exist_ok=True)
        tighten(settings.data_dir)
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


def _uploads(settings: Settings) -> Path:
    """The folder in which Gradio keeps what is uploaded: ours alone, inside the data directory, empty at the start."""
    folder = settings.data_dir / UPLOADS
    shutil.rmtree(folder, ignore_errors=True)  # no page of an earlier server asks for them any more
    folder.mkdir(mode=0o700)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def serve(settings: Settings, *, as_json: bool = False) -> None:
    """Serve until interrupted; answers that were begun are finished first. Raises CannotServe."""
    from chat_app.server import Server

    new_files_private()
    _keep_to_ourselves()
    write_log_lines()
    sys.setswitchinterval(SWITCH_S)
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
            with redirect_stderr(Aside(sys.stderr)):
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

    from chat_app.api import create_api
    from chat_app.guard import Guard
    from chat_app.lending import EngineLender
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
        sweeping = asyncio.create_task(_sweep(operations))
        if settings.engine != "remote":  # another's model server is not ours to end
            room.supervisor.lender = EngineLender(operations)
        room.supervisor.on_end = operations.proposals.wake
        lent = await asyncio.to_thread(room.supervisor.left_paused)
        if lent is not None:
            await slot.pause(*pause_of(lent))
        await asyncio.to_thread(room.supervisor.start)
        starting = asyncio.create_task(start())
        watching = asyncio.create_task(operations.scheduling.watch())
        deciding = asyncio.create_task(operations.proposals.watch())
        try:
            yield
        finally:
            starting.cancel()
            deciding.cancel()
            sweeping.cancel()
            operations.scheduling.stop()
            await asyncio.gather(starting, watching, deciding, sweeping, return_exceptions=True)
            await asyncio.to_thread(room.supervisor.stop)
            await operations.close()

    app = create_api(operations, TRAINER_STATUSES, lifespan=lifespan)
    app.state.operations = operations
    for page in ("/rate", "/admin"):
        app.router.add_route(page, partial(_redirect, f"{page}/"), include_in_schema=False)
    uploads = _uploads(settings)
    mount_pages(app, operations, (refusals.TrainerError,))
    app.add_middleware(Guard, hosts=(*LOOPBACK_NAMES, settings.host), uploads=uploads)  # the last one is the outermost
    return app


async def _redirect(target: str, _: Any) -> Any:
    from starlette.responses import RedirectResponse

    return RedirectResponse(target)


async def _sweep(operations: Operations) -> None:
    """Remove uploads that nobody took, from the start on."""
    while True:
        await asyncio.to_thread(operations.data.remove_expired_uploads)
        await asyncio.sleep(SWEEP_EVERY_S)


def _announce(settings: Settings, url: str, as_json: bool) -> None:
    announce(settings.data_dir, url)
    print(json.dumps({"url": url}) if as_json else f"\nZephyr Loop answers at {url}   (Ctrl-C stops it)\n", flush=True)


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named, since asyncio sends small answers at once (TCP_NODELAY) on sockets of this protocol only: else 40 ms each.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
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
    """Re-derive the hashes of every snapshot, version and backup, and look for what no manifest lists.

    Returns sentences about what is wrong, and the names of what was checked.
    """
    parts = (_verified_snapshots, _verified_versions, _verified_backups)
    found = [
        part(settings.data_dir / name) for name, part in zip(("snapshots", "versions", "backups"), parts, strict=True)
    ]
    return [one for problems, _ in found for one in problems], [one for _, checked in found for one in checked]


def _verified_snapshots(directory: Path) -> tuple[list[str], list[str]]:
    problems: list[str] = []
    names = sorted(path.parent.name for path in directory.glob("*/manifest.json") if not path.parent.is_symlink())
    for name in names:
        try:
            snapshot = snapshots.load_snapshot(directory / name)
            snapshots.verify(snapshot)
            problems += unlisted(directory / name, snapshot.files)
        except StoreError as error:
            problems.append(str(error))
    epitaphs = [path.name for path in directory.glob("*.erased.json") if path.is_file() and not path.is_symlink()]
    return problems + strangers(directory, {*names, *epitaphs}), [f"snapshot {name}" for name in names]


def _verified_versions(directory: Path) -> tuple[list[str], list[str]]:
    from trainer.versions import MANIFEST, Versions

    problems: list[str] = []
    versions = Versions(directory)
    names = [name for name in versions.names() if not (directory / name).is_symlink()]
    for name in names:
        try:
            problems += unlisted(directory / name, {MANIFEST, *versions.verify(name).files})
        except refusals.TrainerError as error:
            problems.append(str(error))
    return problems + strangers(directory, names), [f"version {name}" for name in names]


def _verified_backups(directory: Path) -> tuple[list[str], list[str]]:
    problems: list[str] = []
    backups = list_backups(directory)
    for backup in backups:
        try:
            verify_backup(backup.path)
        except StoreError as error:
            problems.append(str(error))
    ours = {name for backup in backups for name in files_of(backup)}
    return problems + strangers(directory, ours), [f"backup {backup.path.name}" for backup in backups]


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
    if settings.launcher != "local":
        try:
            launcher = launcher_for(Launch(settings.launcher, options=settings.launcher_options[settings.launcher]))
            note("launcher", True, f"{settings.launcher} answers, {launcher.gpus()} GPUs")
        except refusals.TrainingUnavailable as error:
            note("launcher", False, str(error))
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
