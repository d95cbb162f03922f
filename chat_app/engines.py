"""Which base and which engine the settings name: ZLOOP_MODEL, ZLOOP_ENGINE and what belongs to them.

Part of the composition root, and so one of the few of chat_app that know the trainer: the base that is served is the
base that versions are trained on. Heavy imports stand inside the builder that needs them.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chat_app.serving.engine import Engine, EngineError, EngineStartFailed, ServedVersion
from chat_app.settings import Settings
from trainer.base_model import BaseModel, embedded, ensure_base
from trainer.errors import BaseModelMissing
from trainer.served_model import ensure_served

if TYPE_CHECKING:
    from chat_app.serving.remote_engine import RemoteBuilder

ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
ZEPHYR_GPU_BYTES = 20 * 10**9  # 14.5 GB of weights in bf16, keys and values, and what a forward needs


class CannotServe(Exception):
    """The server cannot start; the message says why and what to do."""


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


def served_gguf(settings: Settings, base: BaseModel) -> Path | None:
    """The base as the native engine reads it: the embedded one in the form that answers fastest."""
    if settings.engine != "llama" or settings.model != "auto":
        return base.gguf
    return ensure_served(base, settings.data_dir / "models")


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
    from chat_app.serving.spare_process import LlamaEngines

    return LlamaEngines(settings.data_dir / "logs").build


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
    """Versions on one base in this process; the base is converted or downloaded first, where it has to be.

    A version that is a whole model is loaded beside the base.
    """
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise CannotServe(f"The engine `transformers` needs {' and '.join(missing)}. Run `make setup`.")
    from chat_app.serving.transformers_engine import TransformersEngines

    base, models_dir = base_model(settings), settings.data_dir / "models"
    engines = TransformersEngines(precision=settings.precision)

    async def build(served: ServedVersion) -> Engine:
        if served.checkpoint is not None:
            return await engines.build(replace(served, base_model=str(served.checkpoint)))
        try:
            directory = await asyncio.to_thread(ensure_base, base, models_dir)
        except BaseModelMissing as error:
            raise EngineStartFailed(str(error)) from error
        return await engines.build(replace(served, base_model=str(directory)))

    return build
