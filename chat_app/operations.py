"""Everything a button, a command and an HTTP route do: one method each, the same for all three.

Where it sits: between the edges (`api.py`, `ui/`) and the three rooms behind them (the store, the slot that serves, the
trainer). It holds no state of its own. The trainer is reached through the `Trainer` port, so that this module, like all
of chat_app but its composition root, imports nothing of `trainer`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from chat_app.admission import Admission, Place
from chat_app.against import Known, is_reason
from chat_app.answers import ANYBODY, Answers, Asker, Comparison
from chat_app.baking_watch import Baking, Watch
from chat_app.data import DataOperations
from chat_app.gates import Gates
from chat_app.metrics import Metrics
from chat_app.named_folders import UPLOADS, NamedFolders
from chat_app.pairs import WHY_NOT, sentence_after, sentence_after_edit, sentence_after_rating, settle
from chat_app.policy import NOBODY, POLICY, SCHEDULE, objection, person
from chat_app.presets import FILE, Preset, load_presets
from chat_app.proposals import Proposals, Verdicts
from chat_app.raters import RaterJudge, RaterOperations
from chat_app.refused import Refused as Refused  # noqa: PLC0414 - the edges take it from here
from chat_app.scheduling import Book, Scheduling
from chat_app.serving.engine import NoRoom, Sampling, ServedVersion
from chat_app.serving.slot import ModelSlot, SlotPaused
from chat_app.settings import Settings
from chat_app.trials import Judge, TrialOperations
from chat_app.turns import TurnStream
from chat_app.watching import WatchingOperations
from feedback_store import practice
from feedback_store.errors import StoreError
from feedback_store.importers.sources import is_hub_id
from feedback_store.people import label_of, named
from feedback_store.records import (
    BASE_VERSION,
    GOLD,
    Conversation,
    Counts,
    Edit,
    Message,
    Pair,
    Pick,
    PickChoice,
    Rating,
    Turn,
)
from feedback_store.snapshots import Snapshot
from feedback_store.store import FeedbackStore
from feedback_store.teaching import Untaught

log = logging.getLogger(__name__)

TITLE_CHARACTERS = 60
RATER = "local"
BLIND_SENTENCE = "Saved, thank you."
BENCHMARKS = "benchmarks"
Number = TypeVar("Number", int, float)


class NeedsMaintenance(Refused):
    """There is no room for two engines: the swap must be asked for again, with `maintenance`."""

    def __init__(self, version: str, error: NoRoom, limit_s: float) -> None:
        self.limit_s = limit_s
        super().__init__(
            409,
            f"There is no room for two models ({error}). To serve {version} the present one must end first: repeat "
            f'with {{"maintenance": true}} (zloop: --maintenance). New answers will then wait up to {limit_s:g} s.',
        )


class NeedsForce(Refused):
    """Something speaks against the version (`against`): it must be asked for again, with `force` and a reason."""

    def __init__(self, version: str, against: str, verb: str) -> None:
        self.version = version
        self.against = against
        asked, command = (
            ("promote it", f"zloop promote {version}") if verb == "promote" else ("go back to it", "zloop rollback")
        )
        super().__init__(
            409,
            f"{against} To {asked} all the same, repeat with force and a reason, which stands in the history: "
            f'{{"force": true, "reason": "…"}} ({command} --force --reason "…").',
        )


class RunHandle(Protocol):
    """What this side knows of a run."""

    @property
    def run_id(self) -> str: ...
    @property
    def is_active(self) -> bool: ...
    def as_body(self) -> dict[str, Any]: ...
    def metrics(self) -> list[dict[str, Any]]: ...
    def log_tail(self, n: int) -> list[str]: ...


class Trainer(Judge, Verdicts, RaterJudge, Protocol):
    """The port to the trainer; `trainer.supervisor.Supervisor` fits it."""

    @property
    def schedule_book(self) -> Book: ...
    def start_run(
        self,
        *,
        recipe: str | None = None,
        max_steps: int | None = None,
        num_processes: int | None = None,
        seed: int | None = None,
        practice: str | None = None,
        requested_by: str = "local",
        launcher: str | None = None,
        strategy: str | None = None,
        machines: int | None = None,
        deadline_minutes: float | None = None,
        without: Sequence[str] | None = None,
    ) -> RunHandle: ...
    def prepare_by_hand(self, **request: Any) -> dict[str, Any]: ...
    def command(self, run_id: str) -> dict[str, Any]: ...
    def cancel(self, run_id: str) -> RunHandle: ...
    def resume(self, run_id: str) -> RunHandle: ...
    def run(self, run_id: str) -> RunHandle: ...
    def runs(self) -> Sequence[RunHandle]: ...
    def recipes(self) -> Sequence[Mapping[str, Any]]: ...
    def preflight(self, **request: Any) -> dict[str, Any]: ...
    def snapshot(self, recipe: str | None) -> Snapshot: ...
    def manifests(self) -> Sequence[Mapping[str, Any]]: ...
    def manifest(self, version: str) -> Mapping[str, Any]: ...
    def judgement(self, version: str) -> Mapping[str, Any] | None: ...
    def evaluate(self, version: str, against: str) -> dict[str, Any]: ...
    def benchmark(
        self, benchmark: str, version: str, against: str | None, *, limit: int | None = None, max_tokens: int
    ) -> dict[str, Any]: ...
    def benchmark_names(self) -> Sequence[str]: ...
    def evaluation_report(self, evaluation_id: str) -> Path: ...
    def report(self, run_id: str) -> Path: ...
    def worth(self, champion: str, train_rows: int, new: int, percent_agreement: float | None) -> dict[str, Any]: ...
    def compare_with_base(self, versions: Sequence[str]) -> dict[str, Any]: ...
    def credit(self, version: str, rater: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class PickOutcome:
    """What a pick did: the stored pick, the versions behind the two answers, and how far the next retrain is."""

    pick: Pick
    pair: Pair
    preference_id: str | None
    new_preferences: int
    retrain_every: int
    run_started: str | None
    credit: str | None
    untaught: Untaught | None = None
    is_new: bool = True  # False: a word of the same rater stood already, and stands

    @property
    def is_gold(self) -> bool:
        """Whether the better answer was known before; the rater is not told."""
        return GOLD in self.versions

    @property
    def versions(self) -> tuple[str, str]:
        return (self.pair.first.version, self.pair.second.version)

    def sentence_for(self, pick: PickChoice) -> str:
        """What a rater reads who pressed `pick`: where an earlier word of theirs stands, that one first."""
        if self.is_new or self.pick.pick is pick:
            return self.sentence
        stands = self.pick.pick.value.replace("_", " ")
        return f"Your first word on this pair stands: {stands}. {self.sentence}"

    @property
    def sentence(self) -> str:
        """The line a rater reads after the pick."""
        if self.is_gold:
            return BLIND_SENTENCE
        said = sentence_after(
            self.pick.pick,
            self.versions,
            preference=self.preference_id is not None,
            collected=self.new_preferences,
            every=self.retrain_every,
            untaught=self.untaught,
        )
        started = None if self.run_started is None else "It has started: watch it under Admin."
        if started and self.untaught in WHY_NOT:
            started = "A retrain has started all the same: watch it under Admin."
        return " ".join(filter(None, (said, started, self.credit)))


@dataclass(frozen=True, slots=True)
class Status:
    """What every page shows: who answers, how many picks wait, how far the next retrain is."""

    champion: str
    serving: str | None
    problem: str | None
    new_preferences: int
    retrain_every: int
    counts: Counts
    is_paused: bool = False
    watch: str = ""  # how a new champion does, or why the last one was taken back
    taken_back: tuple[str, ...] = ()  # versions that were clearly worse once they answered
    proposed: tuple[str, ...] = ()  # versions that wait for a person's word


class Operations:
    """The operations of the product.

    `slot` is None where nothing is served (a command on the data directory); `is_due` says from the schedule
    and the situation whether a retrain starts by itself (`scheduling.py`). `metrics` is what the
    parts report to. Raises SettingsError where the presets cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        store: FeedbackStore,
        trainer: Trainer,
        slot: ModelSlot | None,
        is_due: Callable[[Any, Any], Any],
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self._store = store
        self._trainer = trainer
        self._rater = store.person_id(RATER)
        admission = Admission(
            at_once=settings.max_answers,
            per_user=settings.max_answers_per_user,
            max_waiting=settings.max_waiting,
            tokens_per_minute=settings.tokens_per_minute,
            metrics=self.metrics,
        )
        self.metrics.watch(lambda: admission.decoding, lambda: admission.waiting, settings.data_dir)
        self.baking = Baking(settings, store, slot, self.metrics, self._take_back)
        self.answers = Answers(store, slot, self._rater, admission, self.metrics, watcher=self.baking)
        self.gates = Gates()
        self.data = DataOperations(settings, store, RATER, self._cancel_active, self.gates)
        self.watching = WatchingOperations(store, trainer, self.status, self.gates)
        self.presets = load_presets(settings.data_dir / FILE)
        self._slot = slot
        self.scheduling = Scheduling(
            trainer.schedule_book,
            is_due,
            new_preferences=self._new_preferences,
            active_run=lambda: next((run.run_id for run in self.runs() if run.is_active), None),
            start=lambda: self._start_run(requested_by=SCHEDULE).run_id,
        )
        self._problem: str | None = None
        self._promoting = asyncio.Lock()
        self._starting = asyncio.Lock()
        self.raters = RaterOperations(settings, store, trainer, RATER, self.gates)
        self.trials = TrialOperations(
            store, trainer, self.answers, self._promoting,
            share=settings.trial_share, max_votes=settings.trial_max_votes, rater=RATER,
        )  # fmt: skip
        self.proposals = Proposals(
            settings, store, trainer, slot, baking=self.baking, changing=self._promoting,
            make_champion=lambda version, reason: self._make_champion(version, "auto", reason, POLICY),
            challenger=self.trials.challenger, is_practised=self._is_practised, against=self.against,
        )  # fmt: skip
        self.trials.on_end = lambda _: self.proposals.wake()

    # --- starting and stopping -------------------------------------------------------------------------------------

    async def start_serving(self) -> None:
        """Bring up the champion; where it cannot be loaded, the base, with the reason kept for the pages."""
        slot = self.answers.slot
        async with self._starting:
            if slot.is_paused or slot.has_started:  # paused: a run has the memory; `resume_serving` follows it
                return
            with suppress(SlotPaused):  # a moment ago
                await self._start_champion(slot)
                self.answers.wrote_at = time.monotonic()  # the slot's check wrote for real

    async def _start_champion(self, slot: ModelSlot) -> None:
        champion = self._store.champion()
        try:
            await slot.start(self._trainer.served(champion))
        except SlotPaused:
            raise
        except Exception as error:  # whatever is wrong with a version, the base can still answer
            if champion == BASE_VERSION:
                raise
            self._problem = f"The champion {champion} could not be loaded ({error}); {BASE_VERSION} answers instead."
            await slot.start(self._trainer.served(BASE_VERSION))
        await self.trials.go_on()

    async def resume_serving(self) -> None:
        """Bring back what was served before its memory was lent; after a restart in between, the champion."""
        await self.answers.slot.resume()
        await self.start_serving()

    async def drain(self) -> None:
        """Begin no more answers, and let those being written finish, for as long as ZLOOP_SHUTDOWN_S says."""
        await self.answers.drain(self.settings.shutdown_s)

    async def close(self) -> None:
        """Finish what is being stored, then stop the engine."""
        await self.baking.close()
        await self.answers.close()

    # --- chatting --------------------------------------------------------------------------------------------------

    def sampling(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        preset: str | None = None,
        messages: Sequence[Message] = (),
    ) -> Sampling:
        """A `Sampling` with the preset's values, else the product's, where a value is None; raises `BadSampling`.

        `messages`: those that a client sent; what it chose in them or by a value is named in `by_request`.
        """
        chosen, own = self._preset(preset), self.settings
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        usual = {"temperature": own.temperature, "top_p": Sampling().top_p, "max_tokens": own.max_tokens}
        system = [message["content"] for message in messages if message["role"] == "system"]
        by_request = [name for name, value in given.items() if value is not None and value != usual[name]]
        by_request += [name for name, is_so in (("seed", seed is not None), ("stop", stop)) if is_so]
        by_request += ["system"] if system and system != [own.system_prompt] else []
        by_request += ["preset"] if chosen != Preset() else []
        return Sampling(
            temperature=_first(temperature, chosen.temperature, own.temperature),
            top_p=_first(top_p, Sampling().top_p),
            max_tokens=_first(max_tokens, chosen.max_tokens, own.max_tokens),
            seed=seed,
            stop=tuple(stop),
            by_request=tuple(by_request),
        )

    def require_served(self, model: str) -> str | None:
        """The version to pin for `model`, None for the champion. Refuses one that is not being served."""
        serving = self.answers.slot.versions
        if model == "champion":
            return None
        if model in serving:
            return model
        if model in (manifest["version"] for manifest in self._trainer.manifests()):
            raise Refused(
                409,
                f"{model} is not being served; these are: {', '.join(serving)}. "
                f"Promote {model}, serve it beside, or ask for `champion`.",
            )
        raise Refused(
            404, f"There is no model {model!r}. GET /v1/models lists those that exist; `champion` always answers."
        )

    def asked(self, messages: Sequence[Message], preset: str | None = None) -> list[Message]:
        """The messages after the system prompt of the preset, else of the settings, where they bring none."""
        system_prompt = self._preset(preset).system_prompt or self.settings.system_prompt
        if not system_prompt or any(message["role"] == "system" for message in messages):
            return list(messages)
        return [Message(role="system", content=system_prompt), *messages]

    def _preset(self, name: str | None) -> Preset:
        if name is None:
            return Preset()
        if name not in self.presets:
            known = ", ".join(self.presets) or f"none; they are kept in {self.settings.data_dir / FILE}"
            raise Refused(404, f"There is no preset {name!r}. There are: {known}.")
        return self.presets[name]

    # --- conversations ---------------------------------------------------------------------------------------------

    def conversations(self) -> Sequence[Conversation]:
        """The conversations, the latest activity first."""
        return self._store.load_conversations()

    def turns(self, conversation_id: str) -> tuple[Turn, ...]:
        """The turns of a conversation. Raises NotFound."""
        return self._store.load_conversation(conversation_id)[1]

    def begin_turn(self, conversation_id: str | None, text: str, preset: str | None = None) -> Turn:
        """Store a user message, in a new conversation, with its preset, where there is none yet."""
        self._preset(preset)  # an unknown one is refused before anything is stored
        if conversation_id is None:
            title = " ".join(text.split())
            title = title if len(title) <= TITLE_CHARACTERS else title[: TITLE_CHARACTERS - 1] + "…"
            conversation_id = self._store.record_conversation(title, rater=RATER).conversation_id
            if preset is not None:
                self.choose_preset(conversation_id, preset)
        return self._store.record_turn(conversation_id, text)

    def choose_preset(self, conversation_id: str, preset: str | None) -> None:
        """The preset of a conversation's answers from now on, None for none. Raises NotFound, Refused."""
        self._preset(preset)
        self._store.record_preset(conversation_id, preset)

    def preset_of(self, conversation_id: str) -> str | None:
        """The preset a conversation has, where it still exists."""
        chosen = self._store.load_preset(conversation_id)
        return chosen if chosen in self.presets else None

    def reply(self, turn: Turn, asker: Asker = ANYBODY) -> AsyncGenerator[TurnStream | Place, None]:
        """Answer a turn; a later answer of the same turn replaces it in the conversation."""
        sampling = self.sampling(preset=self.preset_of(turn.conversation_id))
        return self.answers.stream(self._history(turn), sampling, turn.turn_id, asker)

    def compare(self, turn: Turn, asker: Asker = ANYBODY) -> AsyncGenerator[Comparison | Place, None]:
        """Answer a turn twice, for a person to pick."""
        sampling = self.sampling(preset=self.preset_of(turn.conversation_id))
        return self.answers.stream_pair(self._history(turn), sampling, turn.turn_id, asker)

    def waiting_pair(self, turn: Turn) -> Pair | None:
        """The pair of this turn that still waits for a pick, if there is one."""
        return self._store.load_waiting_pair(turn.turn_id)

    def left_out_of(self, pair: Pair) -> int:
        """How many messages the answers of a pair were written without, for want of room."""
        return self._store.load_left_out(pair.first.candidate_id)

    def _history(self, turn: Turn) -> list[Message]:
        """The system prompt, what came before and the message itself. Turns nobody answered are left out."""
        messages: list[Message] = []
        for one in self.turns(turn.conversation_id):
            if one.position >= turn.position:
                break
            if one.answer is not None and one.answer.text:
                messages.append(Message(role="user", content=one.text))
                messages.append(Message(role="assistant", content=one.answer.text))
        messages.append(Message(role="user", content=turn.text))
        return self.asked(messages, self.preset_of(turn.conversation_id))

    # --- feedback --------------------------------------------------------------------------------------------------

    def record_pick(
        self,
        pair_id: str,
        pick: PickChoice,
        reasons: Sequence[str] = (),
        comment: str | None = None,
        idempotency_key: str | None = None,
    ) -> PickOutcome:
        """Settle a pair: the conversation goes on with the picked answer; a retrain starts if it is due now."""
        kept = self._store.record_pick(
            pair_id, pick, reasons=reasons, comment=comment, rater=RATER, idempotency_key=idempotency_key
        )
        return self._picked(kept)

    def settle_pair(self, pair_id: str, pick: PickChoice, reasons: Sequence[str] = ()) -> PickOutcome:
        """Settle a pair once: as `record_pick`, but where this rater has judged it, that word stands and is given back.

        For the pages, where a second press or a second tab is no change of mind.
        """
        kept, is_new = self._store.record_first_pick(pair_id, pick, reasons=reasons, rater=RATER)
        return replace(self._picked(kept), is_new=is_new)

    def _picked(self, kept: Pick) -> PickOutcome:
        pair = self._store.load_pair(kept.pair_id)
        if pair.turn_id is not None and pair.rater == self._rater:
            picked = (pair.first, pair.second)[settle(kept.pick)]
            self._store.record_answer(pair.turn_id, picked.candidate_id)
        self.trials.voted(pair)
        preference = self._store.pick_preference(kept)
        untaught = self._store.why_untaught(kept) if preference is None else None
        new = self._new_preferences()
        return PickOutcome(
            kept,
            pair,
            preference.preference_id if preference else None,
            new,
            self.scheduling.every,
            self._start_if_due(new),
            self._trainer.credit(self.champion(), self._rater),
            untaught,
        )

    def record_rating(
        self, candidate_id: str, rating: str, comment: str | None = None, idempotency_key: str | None = None
    ) -> Rating:
        """Thumbs up or down on one answer. Raises NotFound, Conflict."""
        kept = self._store.record_rating(
            candidate_id, rating, comment=comment, rater=RATER, idempotency_key=idempotency_key
        )
        self.baking.rated(candidate_id, rating)
        return kept

    def record_edit(self, candidate_id: str, text: str, idempotency_key: str | None = None) -> Edit:
        """A person's rewrite of an answer. Raises NotFound, Conflict."""
        return self._store.record_edit(candidate_id, text, rater=RATER, idempotency_key=idempotency_key)

    def sentence_of(self, said: Edit | Rating) -> str:
        """What a person reads after a rewrite or a thumb: whether it teaches, and why not."""
        untaught = self._store.why_untaught(said)
        if isinstance(said, Edit):
            return sentence_after_edit(untaught, judges=self._store.judges(said))
        return sentence_after_rating(untaught)

    # --- the loop --------------------------------------------------------------------------------------------------

    def start_run(self, *, practice_taste: str | None = None, by: str | None = None, **request: Any) -> RunHandle:
        """Start a retrain, or a practice with `practice_taste`. `request`: what `Trainer.start_run` takes.

        `by` is who asks; where another person must promote, it may not be left out. Raises what the trainer raises,
        and StoreError.
        """
        request = self.raters.resolved(request)
        name = _person(by)
        if name is None and self.settings.approval == "other":
            raise Refused(
                400,
                "ZLOOP_APPROVAL=other: whoever starts a run does not promote its version, so say who you are: "
                '{"by": "NAME"} (zloop: --by NAME).',
            )
        return self._start_run(practice_taste, requested_by=self._id_of(name), **request)

    def _start_run(self, practice_taste: str | None = None, **request: Any) -> RunHandle:
        with self.gates.starting:
            self._record_practice(practice_taste)
            return self._trainer.start_run(**request, practice=practice_taste)

    def show_command(self, *, practice_taste: str | None = None, **request: Any) -> dict[str, Any]:
        """The command of the run that `start_run` would start, to run it by hand; nothing is started. Raises as it."""
        request = self.raters.resolved(request)
        with self.gates.starting:
            self._record_practice(practice_taste)
            return self._trainer.prepare_by_hand(**request, practice=practice_taste, requested_by=RATER)

    def command(self, run_id: str) -> dict[str, Any]:
        """How the training of a run is started: line, accelerate's configuration, recipe."""
        return self._trainer.command(run_id)

    def _record_practice(self, taste: str | None) -> None:
        if taste is not None:
            self._store.record_practice(practice.preferences_for(taste))

    def preflight(self, *, practice_taste: str | None = None, **request: Any) -> dict[str, Any]:
        """What a run would take, and whether it fits; nothing is started. Raises what `start_run` raises."""
        request = self.raters.resolved(request)
        with self.gates.starting:
            self._record_practice(practice_taste)
            return self._trainer.preflight(**request, practice=practice_taste)

    def cancel_run(self, run_id: str) -> RunHandle:
        """Stop a run."""
        return self._trainer.cancel(run_id)

    def resume_run(self, run_id: str) -> RunHandle:
        """Go on with a run that failed or was cancelled, from its last checkpoint."""
        return self._trainer.resume(run_id)

    def _cancel_active(self, run_ids: Collection[str]) -> None:
        for run in self.runs():
            if run.is_active and run.run_id in run_ids:
                self._trainer.cancel(run.run_id)

    def run(self, run_id: str) -> RunHandle:
        """One run."""
        return self._trainer.run(run_id)

    def runs(self) -> Sequence[RunHandle]:
        """Every run, the newest first."""
        return self._trainer.runs()

    def run_body(self, run: RunHandle) -> dict[str, Any]:
        """A run as people see it."""
        return self._named(run.as_body())

    def _named(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A body with people's labels in the place of their ids."""
        shown: dict[str, Any] = named(body, self._store.labels())
        return shown

    def _id_of(self, name: str | None) -> str:
        """What is kept of a name that a request gives."""
        return NOBODY if name is None else self._store.record_person(label_of(name))

    def recipes(self) -> Sequence[Mapping[str, Any]]:
        """The recipes, the default first: name, method, tuning, about, and the error of one that cannot be used."""
        return self._trainer.recipes()

    def freeze(self, recipe: str | None = None) -> Snapshot:
        """Freeze the present preferences as a recipe mixes them. Raises NotEnoughPreferences."""
        with self.gates.freezing:
            return self._trainer.snapshot(recipe)

    def evaluate(self, version: str, against: str | None) -> dict[str, Any]:
        """Compare `version` with `against` (default: the champion) on held-out pairs."""
        with self.gates.evaluating:
            return self._named(self._trainer.evaluate(version, against or self.champion()))

    def benchmark(
        self, benchmark: str, version: str, against: str | None, *, limit: int | None, max_tokens: int
    ) -> dict[str, Any]:
        """Ask a benchmark of one version or two: its numbers, sentences and tables.

        `benchmark`: a name, a hub id, or a file in `data/benchmarks/`. Raises Refused for any other file.
        """
        if benchmark not in self._trainer.benchmark_names() and not is_hub_id(benchmark):
            folders = NamedFolders([self.settings.data_dir / BENCHMARKS, self.settings.data_dir / UPLOADS])
            found = folders.file(benchmark)
            if found is None:
                named = ", ".join(self._trainer.benchmark_names())
                raise Refused(
                    400,
                    f"There is no benchmark {benchmark[:200]!r}. The named ones are {named}; else name a data set on "
                    f"the hub, or a file in {self.settings.data_dir / BENCHMARKS}. `zloop evaluate` takes any file.",
                )
            benchmark = str(found)
        with self.gates.evaluating:
            return self._trainer.benchmark(benchmark, version, against, limit=limit, max_tokens=max_tokens)

    def compare_with_base(self, versions: Sequence[str]) -> dict[str, Any]:
        """Each of `versions` against the base on the same held-out pairs: {"rows", "snapshots"}."""
        with self.gates.evaluating:
            return self._trainer.compare_with_base(versions)

    def strength(self) -> dict[str, Any]:
        """The strength of every version from all blind picks, and whether it is getting better."""
        with self.gates.counting:
            return self.trials.strength()

    # --- versions --------------------------------------------------------------------------------------------------

    def champion(self) -> str:
        """The version of the last promotion."""
        return self._store.champion()

    def served_versions(self) -> tuple[str, ...]:
        """The versions that answer now, the champion's engine first."""
        return () if self._slot is None else self._slot.versions

    def rollback_target(self) -> str | None:
        """The version a rollback would bring back, if there is one."""
        return self._store.rollback_target()

    def version_rows(self) -> list[dict[str, Any]]:
        """Every version with its state and one line of what it is, the base first."""
        champion, taken_back = self.champion(), self.baking.taken_back()
        served_before = {one for event in self._store.load_promotions() for one in (event.version, event.previous)}
        rows = []
        for manifest in self._trainer.manifests():
            version = manifest["version"]
            verdict = manifest.get("verdict") or {}
            if version == champion:
                state = "champion"
            elif version in taken_back:
                state = "rejected"
            elif version == self.trials.challenger():
                state = "challenger"
            elif version in served_before:
                state = "retired"
            else:
                state = "rejected" if verdict.get("decision") == "reject" else "candidate"
            reason = taken_back.get(version)
            rows.append({**manifest, "state": state, "summary": reason or _summary(manifest), "taken_back": reason})
        return rows

    def known(self, version: str) -> Known:
        """What is known of a version, for and against it as the champion. Raises VersionNotFound, VersionDamaged."""
        trials = (one for one in self._store.load_trials() if one.challenger == version)
        decided = next((one for one in trials if one.state in ("better", "worse")), None)
        lost = decided is not None and decided.state == "worse"
        return Known(
            version,
            self._trainer.judgement(version),
            taken_back=self.baking.taken_back().get(version),
            lost_trial=decided.ended_reason if decided is not None and lost else None,
        )

    def against(self, version: str) -> str | None:
        """What speaks against a version as the champion, in a sentence; None: nothing. Raises as `known`."""
        return self.known(version).against

    def history(self) -> list[dict[str, Any]]:
        """Every promotion and way back, the newest first, with its reason and what was known then."""
        return [
            {
                "at": one.created_at.isoformat(timespec="seconds"),
                "version": one.version,
                "previous": one.previous,
                "kind": one.kind,
                "forced": bool((one.evaluation or {}).get("forced", False)),
                "reason": one.reason,
                "note": (one.evaluation or {}).get("note"),
                "by": one.by,
            }
            for one in reversed(self._store.load_promotions())
        ]

    async def promote(
        self,
        version: str,
        *,
        reason: str = "",
        maintenance: bool = False,
        bake: bool = True,
        by: str | None = None,
        force: bool = False,
    ) -> tuple[str, str]:
        """Make `version` the champion; returns (champion, previous).

        Where a model is served: the new engine starts beside the old one, is checked, and only then is the promotion
        recorded and the reference flipped. If anything fails, the old version serves on and nothing is recorded.
        Raises NeedsMaintenance where there is no room for both; with `maintenance` answers wait while one follows the
        other. With `bake` it is watched from its first answer on, and taken back where it is clearly worse. `by` is who
        promotes; with ZLOOP_APPROVAL=other it must be somebody else than who started the run (400 without a name, 403).
        Raises NeedsForce where something speaks against the version (`against.py`), unless `force` comes with a reason.
        """
        _require_reason(force, reason)
        name = _person(by)
        if self.settings.approval == "other":
            started_by = await asyncio.to_thread(self._trainer.started_by, version)
            refusal = objection(version, named(started_by, self._store.labels()), name and label_of(name))
            if refusal is not None:
                raise Refused(*refusal)
        async with self._promoting:
            previous = self.champion()
            if version == previous:
                raise Refused(409, f"{version} is the champion already.")
            await self._make_champion(
                version, "promote", reason, self._id_of(name), maintenance=maintenance, bake=bake, force=force
            )
        return version, previous

    async def _make_champion(
        self,
        version: str,
        kind: str,
        reason: str,
        by: str,
        *,
        maintenance: bool = False,
        bake: bool = True,
        force: bool = False,
    ) -> None:
        """Under the lock `_promoting`. See `promote`."""
        try:
            known = await asyncio.to_thread(self._permitted, version, kind, force=force)
        except Refused:
            raise
        except Exception:  # there is no such version, or it is damaged: the swap has failed
            self.metrics.swapped(kind, ok=False, took_s=0.0)
            raise
        watch = await asyncio.to_thread(self._watch_over, version, self.champion()) if bake else None

        def record() -> None:
            self._record_promotion(known, kind, reason, by=by)
            self.baking.begin(watch)

        await self._serve(version, kind, record, maintenance)
        self.baking.keep_looking()

    def _permitted(self, version: str, verb: str, *, force: bool) -> Known:
        """What is known of a version that is to be the champion. Raises NeedsForce where that speaks against it."""
        known = self.known(version)
        if known.against is not None and not force:
            raise NeedsForce(version, known.against, verb)
        return known

    async def rollback(self, *, maintenance: bool = False, force: bool = False, reason: str = "") -> tuple[str, str]:
        """Go back to the champion before this one; returns (champion, previous). The arguments: see `promote`."""
        _require_reason(force, reason)
        async with self._promoting:
            previous, target = self.champion(), self.rollback_target()
            if target is None:
                raise Refused(409, f"There is nothing to roll back to: {previous} is the first champion.")
            known = await asyncio.to_thread(self._permitted, target, "rollback", force=force)
            said = f"rolled back from {previous}" + (f": {reason}" if reason else "")
            await self._serve(target, "rollback", partial(self._record_promotion, known, "rollback", said), maintenance)
            self.baking.end()
        return target, previous

    def _watch_over(self, version: str, previous: str) -> Watch | None:
        """A taste that is practised may be about length: then longer answers are no trouble."""
        practised = self._is_practised(version) or self._is_practised(previous)
        return self.baking.prepare(version, previous, judge_length=not practised)

    def _is_practised(self, version: str) -> bool:
        try:
            return self._trainer.manifest(version).get("practice") is not None
        except Exception as error:  # noqa: BLE001 - a damaged champion can be followed, a missing version is refused next
            log.warning("The manifest of %s cannot be read: %s", version, error)
            return False

    async def _take_back(self, version: str, reason: str) -> bool:
        """Go back from a version that turned out clearly worse; False where somebody has changed the champion already.

        The version before is warm, so this is a flip; where it is not and there is no room for both, answers wait.
        """
        async with self._promoting:
            target = self.rollback_target()
            if self.champion() != version or target is None:
                return False
            known = await asyncio.to_thread(self.known, target)
            record = partial(self._record_promotion, known, "auto-rollback", reason, by="baking")
            try:
                await self._serve(target, "auto-rollback", record, maintenance=False)
            except NeedsMaintenance:
                await self._serve(target, "auto-rollback", record, maintenance=True)
        return True

    async def serve_beside(self, version: str) -> tuple[str, ...]:
        """Serve a version beside the champion, for who asks for it by name; returns all that are served."""
        slot = self.answers.slot
        with self.gates.loading:
            served = await asyncio.to_thread(self._trainer.served, version)
            await slot.serve_beside(served)
        return slot.versions

    async def release(self, version: str) -> tuple[str, ...]:
        """Serve a version beside the champion no longer; returns all that are served. Raises VersionNotServed."""
        if version == self.trials.challenger():
            raise Refused(409, f"{version} is on live trial: stop the trial, which releases it.")
        await self.answers.slot.release(version)
        return self.answers.slot.versions

    async def _serve(self, version: str, kind: str, record: Callable[[], None], maintenance: bool) -> None:
        async def commit() -> None:
            await asyncio.to_thread(record)

        began, ok = time.monotonic(), False
        try:
            served = await asyncio.to_thread(self._trainer.served, version)
            if self._slot is None or self._slot.version == version:
                await commit()
            else:
                await self._swap(self._slot, served, commit, maintenance)
            ok = True
        finally:
            self.metrics.swapped(kind, ok=ok, took_s=time.monotonic() - began)
        self._problem = None
        await self.trials.champion_changed()

    async def _swap(
        self, slot: ModelSlot, served: ServedVersion, commit: Callable[[], Awaitable[None]], maintenance: bool
    ) -> None:
        try:
            await slot.swap(served, commit, maintenance=maintenance)
        except NoRoom as error:
            if maintenance:  # it does not fit alone either
                raise
            raise NeedsMaintenance(served.version, error, slot.maintenance_limit_s) from error

    def dismiss(self, version: str, *, reason: str = "", by: str | None = None) -> None:
        """Propose a version no longer. Raises NotFound where it is not proposed."""
        self.proposals.dismiss(version, by=self._id_of(_person(by)), reason=reason)

    def _record_promotion(self, known: Known, kind: str, reason: str, *, by: str = RATER) -> None:
        """Beside its evaluation stands what else the history says: that it was forced, and against what."""
        evaluation = self._trainer.manifest(known.version).get("evaluation")
        if known.note is not None:
            forced = known.against is not None and kind in ("promote", "rollback")
            evaluation = {**(evaluation or {}), "forced": forced, "note": known.note}
        self._store.record_promotion(known.version, kind=kind, reason=reason, by=by, evaluation=evaluation)

    # --- health ----------------------------------------------------------------------------------------------------

    def check_store(self) -> None:
        """Raise StoreError where the store cannot keep what people say just now."""
        try:
            self.data.check()
        except StoreError:
            self.metrics.store_checked(ok=False)
            raise
        self.metrics.store_checked(ok=True)

    def render_metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self.metrics.render(self._serving())

    # --- what every page shows -------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Who answers, what waits, how far the next retrain is."""
        return Status(
            champion=self.champion(),
            serving=self._serving(),
            problem=self._problem or (self._slot.problem if self._slot is not None else None),
            new_preferences=self._new_preferences(),
            retrain_every=self.scheduling.every,
            counts=self._store.counts(),
            is_paused=self._slot is not None and self._slot.is_paused,
            watch=self.baking.sentence(),
            taken_back=tuple(self.baking.taken_back()),
            proposed=tuple(one.version for one in self.proposals.open()),
        )

    def _serving(self) -> str | None:
        return self._slot.version if self._slot is not None and self._slot.is_ready else None

    def _new_preferences(self) -> int:
        """Preferences from picks since the last real run began; however it ended."""
        began = next((body["created_at"] for run in self.runs() if (body := run.as_body())["practice"] is None), None)
        return self._store.picks_since(datetime.fromisoformat(began) if began else None)

    def _start_if_due(self, new_preferences: int) -> str | None:
        try:
            return self.scheduling.look(new_preferences)
        except Exception as error:  # noqa: BLE001 - the pick is stored; a retrain that cannot start must not hide that
            log.warning("A retrain may be due; the schedule could not be asked: %s", error)
            return None


def _person(by: str | None) -> str | None:
    """The name a request gives, None for none; one of the program's own is refused."""
    try:
        return person(by)
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _require_reason(force: bool, reason: str) -> None:
    if force and not is_reason(reason):
        raise Refused(
            422, f"force needs a reason that can be read later, and it is {reason[:80]!r}: say why, in a few words."
        )


def _first(*values: Number | None) -> Number:
    """The first value that is not None; the last one is a default."""
    return next(value for value in values if value is not None)


def _summary(manifest: Mapping[str, Any]) -> str:
    """One line of what a version is."""
    if manifest["run_id"] is None:
        return f"the base, {manifest['base']}"
    what = f"practice: {manifest['practice']} · " if manifest.get("practice") else ""
    verdict = manifest["verdict"] or {}
    made = (manifest.get("method", "dpo"), manifest.get("tuning", "lora"))
    what += "" if made == ("dpo", "lora") else f"{' · '.join(made)} · "
    reasons = verdict.get("reasons") or ["no reasons are known"]
    return f"{what}{verdict.get('decision') or 'not judged'}: {reasons[0]}"
