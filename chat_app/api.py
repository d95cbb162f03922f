"""The HTTP API: OpenAI-compatible chat, feedback, and the operations of the loop. Bodies as in the README.

Where it sits: at the edge. A route checks the body, calls one method of `Operations` and shapes the answer; errors
become one JSON shape. Accounts do not exist yet, so every rater is `local` and the server listens on loopback only.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from chat_app.admission import Place
from chat_app.answers import STOPPED, Asker
from chat_app.checked_requests import CheckedRequests, LastWord
from chat_app.data_api import Name, Nothing, Strict, data_routes
from chat_app.departures import ClientGone, while_present
from chat_app.error_shape import BROKEN, error_body, error_response, response_to_os_error
from chat_app.evaluation_api import evaluation_routes
from chat_app.fields import Id, IdempotencyKey, ModelName, PathId, PresetName, Reason, RecipeName, Stop, Taste
from chat_app.health import Readiness
from chat_app.metrics import CONTENT_TYPE
from chat_app.openai_body import honoured, plain_messages
from chat_app.openapi import describe
from chat_app.operations import BLIND_SENTENCE, Operations, Refused
from chat_app.prompts import LeftOut
from chat_app.proposal_api import proposal_routes
from chat_app.raters_api import raters_routes
from chat_app.scheduling_api import scheduling_routes
from chat_app.serving.engine import (
    MAX_STOPS,
    BadMessages,
    BadSampling,
    ContextOverflow,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    NoRoom,
    VersionNotServed,
)
from chat_app.trial_api import trial_routes
from chat_app.turns import TurnStream
from chat_app.watching_api import watching_routes
from feedback_store.errors import (
    BadGoldPairs,
    BadImport,
    Conflict,
    InvalidRecord,
    NotEnoughPreferences,
    NotFound,
    PushRefused,
    QueryRefused,
    StoreBusy,
    StoreDamaged,
    StoreError,
)
from feedback_store.records import Message, PickChoice

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARACTERS = 100_000
MAX_MESSAGES = 1_000
MAX_USER_CHARACTERS = 256
CHAMPION = "champion"
_EVENTS = {"type": "string", "description": "With `stream`: events of chunks, then `[DONE]`, or an error event."}
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")

STATUSES: dict[type[Exception], int] = {
    BadSampling: 400,
    BadMessages: 422,
    ContextOverflow: 413,
    VersionNotServed: 409,
    NoRoom: 409,
    EngineBroken: 503,
    EngineError: 503,
    NotFound: 404,
    Conflict: 409,
    InvalidRecord: 422,
    BadImport: 400,
    BadGoldPairs: 409,
    NotEnoughPreferences: 409,
    PushRefused: 409,
    QueryRefused: 400,
    StoreBusy: 503,
    StoreDamaged: 503,
    StoreError: 500,
}
"""Which status an error of our own gets; the composition root adds the trainer's."""


class MessageBody(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)]


UserName = Annotated[str | None, Field(max_length=MAX_USER_CHARACTERS)]
Messages = Annotated[list[MessageBody], BeforeValidator(plain_messages), Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(BaseModel):
    """OpenAI's body. A key that is not honoured here is refused by its name: `openai_body.py`."""

    messages: Messages
    model: ModelName = CHAMPION
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    preset: PresetName | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    user: UserName = None
    safety_identifier: UserName = None  # the newer name of the same

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body: Any) -> Any:
        return honoured(body, cls.model_fields)


class PairBody(Strict):
    messages: Messages
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    preset: PresetName | None = None
    user: UserName = None


class PickBody(Strict):
    pair_id: Id
    pick: PickChoice
    reasons: Annotated[list[Reason], Field(max_length=20, default_factory=list)]
    comment: Annotated[str | None, Field(max_length=10_000)] = None
    idempotency_key: IdempotencyKey = None
    reveal: bool = True


class RatingBody(Strict):
    candidate_id: Id
    rating: Literal["up", "down"]
    comment: Annotated[str | None, Field(max_length=10_000)] = None
    idempotency_key: IdempotencyKey = None


class EditBody(Strict):
    candidate_id: Id
    text: Annotated[str, Field(min_length=1, max_length=MAX_MESSAGE_CHARACTERS)]
    idempotency_key: IdempotencyKey = None


class RunBody(Strict):
    recipe: RecipeName | None = None
    max_steps: Annotated[int | None, Field(ge=1)] = None
    num_processes: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    practice: Taste | None = None
    launcher: Literal["local", "slurm", "ray"] | None = None
    strategy: Literal["ddp", "fsdp2", "zero3"] | None = None
    machines: Annotated[int | None, Field(ge=1)] = None
    deadline_minutes: Annotated[float | None, Field(gt=0)] = None
    by: UserName = None
    without: Annotated[list[Name], Field(max_length=1_000)] | None = None
    dry_run: bool = False


class SnapshotBody(Strict):
    recipe: RecipeName | None = None


class PromoteBody(Strict):
    reason: Annotated[str, Field(max_length=2_000)] = ""
    maintenance: bool = False
    bake: bool = True
    by: UserName = None
    force: bool = False


class RollbackBody(Strict):
    maintenance: bool = False
    force: bool = False
    reason: Annotated[str, Field(max_length=2_000)] = ""


def create_api(
    operations: Operations, statuses: Mapping[type[Exception], int], lifespan: Callable[[FastAPI], Any] | None = None
) -> FastAPI:
    """The application with every route of the API. `statuses` adds to `STATUSES` (nearest class wins)."""
    app = FastAPI(title="Zephyr Loop", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(_chat_routes(operations))
    app.include_router(_feedback_routes(operations))
    app.include_router(data_routes(operations.data))
    app.include_router(_loop_routes(operations))
    app.include_router(_version_routes(operations))
    app.include_router(evaluation_routes(operations))
    app.include_router(watching_routes(operations.watching))
    app.include_router(scheduling_routes(operations))
    app.include_router(trial_routes(operations))
    app.include_router(proposal_routes(operations))
    app.include_router(raters_routes(operations))
    app.include_router(_health_routes(operations))
    routes = list(app.router.routes)
    for path in ("/v1", "/v1/{rest:path}", "/livez", "/readyz", "/metrics", "/openapi.json"):
        app.router.routes.append(Route(path, NoSuchRoute(routes), name="no such route", include_in_schema=False))
    _handle_errors(app, {**STATUSES, **statuses}, operations)
    app.add_middleware(CheckedRequests)
    app.add_middleware(LastWord)
    describe(app)
    return app


class NoSuchRoute:
    """What no route of the API answers: 405 where one has another method, else 404.

    Without this, the chat page mounted at `/` would answer in its own words.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = f"{scope['method']} {scope['path']}"
        allowed = [method for method in METHODS if self._has(method, scope)]
        if allowed:
            named = ", ".join(allowed)
            refusal = error_response(405, f"There is no {asked}: this path has {named}.", headers={"Allow": named})
        else:
            refusal = error_response(404, f"There is no {asked}. /openapi.json lists what there is.")
        await refusal(scope, receive, send)

    def _has(self, method: str, scope: Scope) -> bool:
        return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in self._routes)


def _messages(bodies: Sequence[MessageBody]) -> list[Message]:
    if bodies[-1].role != "user" or not bodies[-1].content.strip():
        raise Refused(422, "messages must end with a user message that is not empty: that is what gets answered.")
    return [Message(role=body.role, content=body.content) for body in bodies]


def _asker(request: Request, user: str | None, route: str) -> Asker:
    """Who asks, as far as one can tell without accounts: the name a client gives, else its address."""
    address = request.client.host if request.client is not None else "local"
    return Asker(f"user:{user}" if user else f"address:{address}", route, origin=f"address:{address}")


@contextmanager
def _counted_from(first: int) -> Iterator[None]:
    """A refused message is named as its client counts: the product may have put `first` messages before its own."""
    try:
        yield
    except BadMessages as error:
        if error.index is None:
            raise error.at(None, error.roles[first:]) from error
        if error.index < first:
            raise EngineRefused(
                f"the chat template of {error.who} takes no system prompt ({error.said}): set ZLOOP_SYSTEM_PROMPT to "
                "nothing, and choose no preset that has one"
            ) from error
        raise error.at(error.index - first, error.roles[first:]) from error


# --- chat ------------------------------------------------------------------------------------------------------------


def _chat_routes(operations: Operations) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post("/chat/completions", responses={200: {"content": {"text/event-stream": {"schema": _EVENTS}}}})
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer by the champion or a version served beside it; with `stream`, as events that end with `[DONE]`.

        `user` (or `safety_identifier`) only tells whose turn it is where many ask at once. 429 with `Retry-After`
        where the user's own requests or tokens are too many, 503 where everybody's are.
        """
        version = operations.require_served(body.model)
        sent = _messages(body.messages)
        sampling = operations.sampling(
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
            preset=body.preset,
            messages=sent,
        )
        messages = operations.asked(sent, body.preset)
        asker = _asker(request, body.safety_identifier or body.user, "chat")
        put_first = len(messages) - len(sent)
        with _counted_from(put_first):
            if not body.stream:
                answering = operations.answers.answer(messages, sampling, asker, version)
                turn = await while_present(request.receive, answering)
                return JSONResponse(_completion(turn), headers=_headers(turn))
            growing = operations.answers.stream(messages, sampling, asker=asker, version=version)
            # What fails before the first token gets a status of its own.
            first = await while_present(request.receive, _begun(growing))
            return AnswerEvents(first, growing, put_first)

    @router.get("/presets")
    async def presets() -> dict[str, Any]:
        """The presets by name, and the system prompt where none is chosen."""
        found = [{"name": name, **preset.model_dump()} for name, preset in operations.presets.items()]
        return {"presets": found, "system_prompt": operations.settings.system_prompt or None}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """`champion`, and every version by its name."""
        names = [CHAMPION, *(row["version"] for row in await run_in_threadpool(operations.version_rows))]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "zephyr-loop"} for name in names],
        }

    return router


def _headers(turn: TurnStream) -> dict[str, str]:
    left_out = {"X-Zloop-Left-Out": str(turn.left_out.messages)} if turn.left_out.messages else {}
    return {"X-Zloop-Version": turn.version, **left_out}


def _left_out(left_out: LeftOut) -> dict[str, Any]:
    """The key of an answer that was written without the whole conversation."""
    return {"left_out": left_out.as_body()} if left_out.messages else {}


def _completion(turn: TurnStream) -> dict[str, Any]:
    usage = turn.usage
    return {
        **_left_out(turn.left_out),
        "id": turn.candidate_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": turn.version,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": turn.text},
                "finish_reason": turn.finish_reason,
            }
        ],
        "usage": None
        if usage is None
        else {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }


async def _begun(growing: AsyncGenerator[TurnStream | Place, None]) -> TurnStream:
    """The answer once it has begun. Raises EngineError."""
    async for grown in growing:
        if isinstance(grown, TurnStream):
            return grown
    raise EngineBroken(STOPPED)


class AnswerEvents(StreamingResponse):
    """A growing answer as server-sent events; when the client leaves, the answer stops."""

    def __init__(self, turn: TurnStream, growing: AsyncGenerator[TurnStream | Place, None], put_first: int) -> None:
        headers = {**_headers(turn), "Cache-Control": "no-store"}
        super().__init__(_events(turn, growing, put_first), media_type="text/event-stream", headers=headers)
        self._growing = growing

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_present(receive, self._written(send))
        except ClientGone:
            log.info("A client left before the end of its answer.")

    async def _written(self, send: Send) -> None:
        async with aclosing(self._growing):
            await self.stream_response(send)


async def _events(turn: TurnStream, growing: AsyncIterator[TurnStream | Place], put_first: int) -> AsyncIterator[str]:
    said_what_is_left_out = False

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        nonlocal said_what_is_left_out
        left_out = {} if said_what_is_left_out else _left_out(turn.left_out)
        said_what_is_left_out = said_what_is_left_out or bool(left_out)
        chunk = {
            "id": turn.candidate_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": turn.version,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
            **left_out,
        }
        return f"data: {json.dumps(chunk)}\n\n"

    sent = len(turn.text)
    yield event({"role": "assistant", "content": turn.text})
    try:
        with _counted_from(put_first):
            async for _ in growing:
                if len(turn.text) > sent:
                    yield event({"content": turn.text[sent:]})
                    sent = len(turn.text)
    except EngineError as error:
        yield f"data: {json.dumps(error_body('engine_failed', str(error)))}\n\n"
        return
    except StoreError as error:
        log.error("An answer could not be stored: %s", error)
        yield f"data: {json.dumps(error_body('unavailable', str(error)))}\n\n"
        return
    except Exception:
        log.exception("An answer broke while it was sent.")
        yield f"data: {json.dumps(error_body('failed', BROKEN))}\n\n"
        return
    if turn.finish_reason == "cancelled":
        yield f"data: {json.dumps(error_body('unavailable', STOPPED))}\n\n"
        return
    yield event({}, turn.finish_reason)
    yield "data: [DONE]\n\n"


# --- feedback --------------------------------------------------------------------------------------------------------


def _feedback_routes(operations: Operations) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["feedback"])

    @router.post("/pairs")
    async def pairs(body: PairBody, request: Request) -> dict[str, Any]:
        """Two answers to the same messages, blind, in random order. 429 and 503 as for one answer."""
        sent = _messages(body.messages)
        sampling = operations.sampling(
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            seed=body.seed,
            preset=body.preset,
            messages=sent,
        )
        messages = operations.asked(sent, body.preset)
        asker = _asker(request, body.user, "pairs")
        with _counted_from(len(messages) - len(sent)):
            pair, left_out = await while_present(
                request.receive, operations.answers.make_pair(messages, sampling, asker)
            )
        return {
            **_left_out(left_out),
            "pair_id": pair.pair_id,
            "candidates": [
                {"candidate_id": one.candidate_id, "text": one.text, "finish_reason": one.finish_reason}
                for one in (pair.first, pair.second)
            ],
        }

    @router.post("/picks")
    def picks(body: PickBody) -> dict[str, Any]:
        """Settle a pair. The versions are revealed; `preference_id` is null where the pick teaches nothing as things
        stand: `message` says why, and `new_preferences` does not count it.

        With `reveal` false, as for pairs of POST /v1/rate, nothing is said of the pair but that the pick is kept.
        """
        outcome = operations.record_pick(
            body.pair_id, body.pick, body.reasons, body.comment, idempotency_key=body.idempotency_key
        )
        if outcome.is_gold or not body.reveal:
            return {"pick_id": outcome.pick.pick_id, "versions": None, "preference_id": None, "message": BLIND_SENTENCE}
        return {
            "pick_id": outcome.pick.pick_id,
            "versions": list(outcome.versions),
            "preference_id": outcome.preference_id,
            "new_preferences": outcome.new_preferences,
            "retrain_every": outcome.retrain_every,
            "run_started": outcome.run_started,
            "credit": outcome.credit,
            "message": outcome.sentence,
        }

    @router.post("/ratings")
    def ratings(body: RatingBody) -> dict[str, Any]:
        """Thumbs up or down on one answer (`id` of a completion, or a `candidate_id`)."""
        kept = operations.record_rating(body.candidate_id, body.rating, body.comment, body.idempotency_key)
        return {"rating_id": kept.rating_id, "message": operations.sentence_of(kept)}

    @router.post("/edits")
    def edits(body: EditBody) -> dict[str, Any]:
        """A person's rewrite of an answer: better than the answer it rewrites, where that one was complete."""
        kept = operations.record_edit(body.candidate_id, body.text, body.idempotency_key)
        return {"edit_id": kept.edit_id, "message": operations.sentence_of(kept)}

    return router


# --- the loop --------------------------------------------------------------------------------------------------------


def _loop_routes(operations: Operations) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["loop"])
    starting = asyncio.Semaphore(1)

    @router.post("/snapshots")
    def snapshots(body: SnapshotBody | None = None) -> dict[str, Any]:
        """Freeze the present preferences as a recipe mixes them (a run does this by itself)."""
        frozen = operations.freeze(body.recipe if body else None)
        return {
            "snapshot": frozen.hash,
            "train": frozen.train_rows,
            "held_out": frozen.held_out_rows,
            "counts": dict(frozen.counts),
            "left_out": dict(frozen.left_out),
            "redacted": dict(frozen.redacted),
        }

    @router.get("/recipes")
    def recipes() -> dict[str, Any]:
        """How a run can learn: the recipes that ship and the team's own, the default first."""
        return {"recipes": operations.recipes()}

    @router.post("/runs")
    async def start_run(body: RunBody | None = None) -> dict[str, Any]:
        """Start a retrain; 409 with the active run where one runs. `dry_run`: only show its command, start nothing.

        `by`: who asks; needed with ZLOOP_APPROVAL=other.
        """
        async with starting:  # whoever comes second waits, here and in no thread, and hears of the run that goes on
            return await run_in_threadpool(_start_run, body or RunBody())

    def _start_run(body: RunBody) -> dict[str, Any]:
        request = body.model_dump(exclude={"dry_run", "practice", "by"})
        if body.dry_run:
            return {"run_id": None, "command": operations.show_command(**request, practice_taste=body.practice)}
        return operations.run_body(operations.start_run(**request, practice_taste=body.practice, by=body.by))

    @router.get("/runs")
    def runs() -> dict[str, Any]:
        """Every run, the newest first."""
        return {"runs": [operations.run_body(run) for run in operations.runs()]}

    @router.get("/runs/{run_id}")
    def run(run_id: PathId) -> dict[str, Any]:
        """One run: state, step, metrics, verdict, error, and the command that trains it."""
        return {**operations.run_body(operations.run(run_id)), "command": operations.command(run_id)}

    @router.post("/runs/{run_id}/cancel")
    def cancel(run_id: PathId, _: Nothing | None = None) -> dict[str, Any]:
        """Stop a run; nothing it made is served."""
        return operations.run_body(operations.cancel_run(run_id))

    @router.post("/runs/{run_id}/resume")
    def resume(run_id: PathId, _: Nothing | None = None) -> dict[str, Any]:
        """Go on with a run that failed or was cancelled, from its last checkpoint; 409 where another one runs."""
        return operations.run_body(operations.resume_run(run_id))

    return router


def _version_routes(operations: Operations) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["loop"])

    @router.get("/versions")
    def versions() -> dict[str, Any]:
        """The champion, what is served now, every version with its state and what speaks `against` it; the history."""
        rows = operations.version_rows()
        return {
            "champion": operations.champion(),
            "served": operations.served_versions(),
            "versions": [{**row, "against": operations.against(row["version"])} for row in rows],
            "history": operations.history(),
        }

    @router.post("/versions/{version}/promote")
    async def promote(version: PathId, body: PromoteBody | None = None) -> dict[str, Any]:
        """Make a version the champion: started beside, checked, then swapped in without dropping a reply.

        With `bake` (the default) it is watched, and taken back by itself where it is clearly worse: GET /v1/baking.
        `by`: who promotes; with ZLOOP_APPROVAL=other 400 without it, 403 for who started the run of the version.
        Where something speaks against the version (judged worse, taken back …) 409, unless `force` comes with a reason.
        """
        body = body or PromoteBody()
        champion, previous = await operations.promote(
            version,
            reason=body.reason,
            maintenance=body.maintenance,
            bake=body.bake,
            by=body.by,
            force=body.force,
        )
        return {"champion": champion, "previous": previous}

    @router.post("/rollback")
    async def rollback(body: RollbackBody | None = None) -> dict[str, Any]:
        """Go back to the champion before this one; where something speaks against that one, as for a promotion."""
        body = body or RollbackBody()
        champion, previous = await operations.rollback(
            maintenance=body.maintenance, force=body.force, reason=body.reason
        )
        return {"champion": champion, "previous": previous}

    @router.get("/baking")
    def baking() -> dict[str, Any]:
        """How a new champion does against the version before: state, numbers of both, and what was taken back."""
        return operations.baking.as_body()

    @router.post("/versions/{version}/serve")
    async def serve(version: PathId, _: Nothing | None = None) -> dict[str, Any]:
        """Serve a version beside the champion, for who names it as `model`; `warning`: what speaks against it."""
        served = await operations.serve_beside(version)
        return {"served": served, "warning": await run_in_threadpool(operations.against, version)}

    @router.post("/versions/{version}/release")
    async def release(version: PathId, _: Nothing | None = None) -> dict[str, Any]:
        """Serve it beside the champion no longer."""
        return {"served": await operations.release(version)}

    return router


# --- health ----------------------------------------------------------------------------------------------------------


def _health_routes(operations: Operations) -> APIRouter:
    router = APIRouter(tags=["health"])
    readiness = Readiness(operations)

    @router.get("/livez")
    async def livez() -> dict[str, Any]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"description": "Not ready; `problem` says why."}})
    async def readyz() -> JSONResponse:
        """A model writes and the store can keep what people say; 503 with the reason otherwise."""
        problem = await readiness.problem()
        if problem is not None:
            return JSONResponse({"status": "not ready", "problem": problem}, 503, {"Retry-After": "5"})
        status = await run_in_threadpool(operations.status)
        body = {
            "status": "ok" if status.problem is None else "degraded",
            "serving": status.serving,
            "champion": status.champion,
            "problem": status.problem,
        }
        return JSONResponse(body)

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Times, tokens, the line, versions and swaps, in Prometheus' text format."""
        return Response(operations.render_metrics(), media_type=CONTENT_TYPE)

    return router


# --- errors ----------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI, statuses: Mapping[type[Exception], int], operations: Operations) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        status = next(statuses[kind] for kind in type(error).__mro__ if kind in statuses)
        if status >= 500:
            log.warning("%s: %s", type(error).__name__, error)
        extra = operations.run_body(error.run) if hasattr(error, "run") else {}
        retry_after_s = math.ceil(error.retry_after_s) if isinstance(error, EngineBusy) else None
        param = "messages" if isinstance(error, BadMessages) else None
        return error_response(status, str(error), param=param, extra=extra, retry_after_s=retry_after_s)

    async def busy(_: Request, error: Exception) -> Response:
        assert isinstance(error, EngineBusy)
        return error_response(429 if error.yours else 503, str(error), retry_after_s=math.ceil(error.retry_after_s))

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_response(error.status, str(error), param=error.param, retry_after_s=error.retry_after_s)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        shown = "" if first["type"] == "missing" else f" (got {str(first.get('input'))[:80]!r})"
        return error_response(422, f"{param or 'body'}: {first['msg']}{shown}.", param=param)

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, f"{error.detail}.", headers=error.headers)

    async def broke(_: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)
        return response_to_os_error(error)

    for kind in statuses:
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(EngineBusy, busy)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(OSError, broke)
