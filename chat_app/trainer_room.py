"""The trainer as `Operations` sees it: the supervisor, the versions on disk, the base. Part of the composition root."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tzlocal import get_localzone_name

from chat_app.engines import base_model, served_gguf
from chat_app.serving.engine import Canary, ServedVersion
from chat_app.serving.memory import available_bytes, total_bytes
from chat_app.settings import Settings, SettingsError
from feedback_store import snapshots
from feedback_store.errors import NotEnoughPreferences
from feedback_store.evaluation_prompts import FOLDER, load_evaluation_prompts
from feedback_store.mixing import RATINGS, Mix
from feedback_store.preferences import TRAIN
from feedback_store.records import BASE_VERSION, Comparisons, UnpairedPreference
from feedback_store.store import FeedbackStore
from trainer.benchmarks.bench import Asked
from trainer.benchmarks.judge import Judge
from trainer.benchmarks.questions import ALPACA_EVAL, SOURCES
from trainer.benchmarks.words import tables
from trainer.comparison_table import table
from trainer.credits import credits_of
from trainer.errors import BadRecipe, BadRunRequest, BadSchedule, TrainerError, TrainingUnavailable
from trainer.judged import judged_runs
from trainer.judgement import judgement
from trainer.launch import check_training_available
from trainer.pages import REPORT
from trainer.preflight import Policy
from trainer.recipe import DEFAULT, PRACTICE, load_recipe, recipe_names
from trainer.report import ensure_report
from trainer.room import Room, machine_room
from trainer.runs import Run, RunState
from trainer.schedule import Schedule
from trainer.schedule_book import ScheduleBook
from trainer.supervisor import Supervisor
from trainer.verdict import decide
from trainer.worth import expect


class TrainerRoom:
    """What `Operations` asks of the trainer."""

    def __init__(self, settings: Settings, store: FeedbackStore) -> None:
        self._settings = settings
        self._store = store
        self._base = base_model(settings)
        self.supervisor = Supervisor(
            settings.data_dir,
            self._base,
            partial(freeze, settings, store),
            store.champion,
            trackers=tuple(filter(None, settings.trackers.split(","))),
            launcher=settings.launcher,
            strategy=None if settings.strategy == "auto" else settings.strategy,
            launcher_options=settings.launcher_options,
            policy=Policy(settings.device_policy),
            room=room_of,
            judge=judge_of(settings),
        )

        self.schedule_book = schedule_book(settings)

    def start_run(self, **request: Any) -> Run:
        return self.supervisor.start_run(**request)

    def prepare_by_hand(self, **request: Any) -> dict[str, Any]:
        return self.supervisor.prepare_by_hand(**request)

    def command(self, run_id: str) -> dict[str, Any]:
        return self.supervisor.command(run_id)

    def preflight(self, **request: Any) -> dict[str, Any]:
        """What a run would take; nothing is started or written."""
        return self.supervisor.preflight(partial(preview, self._settings, self._store), **request)

    def cancel(self, run_id: str) -> Run:
        return self.supervisor.cancel(run_id)

    def resume(self, run_id: str) -> Run:
        return self.supervisor.resume(run_id)

    def run(self, run_id: str) -> Run:
        return self.supervisor.run(run_id)

    def runs(self) -> Sequence[Run]:
        return self.supervisor.runs()

    def recipes(self) -> Sequence[Mapping[str, Any]]:
        """The recipes for real data, the default first; one of the team's own that is wrong has its `error`."""
        own = self.supervisor.own_recipes
        names = sorted(set(recipe_names(own)) - {PRACTICE}, key=lambda name: (name != DEFAULT, name))
        return [_described(name, own) for name in names]

    def snapshot(self, recipe: str | None) -> snapshots.Snapshot:
        """Freeze the present preferences as a recipe (the default one for None) mixes them."""
        mix = load_recipe(recipe or DEFAULT, self.supervisor.own_recipes).mix(seed=0)
        return freeze(self._settings, self._store, None, mix)

    def manifests(self) -> Sequence[Mapping[str, Any]]:
        """The base as `v0`, then every published version, oldest first."""
        return [self.manifest(name) for name in (BASE_VERSION, *self.supervisor.versions.names())]

    def manifest(self, version: str) -> Mapping[str, Any]:
        """Of one version. Raises VersionNotFound, VersionDamaged."""
        if version == BASE_VERSION:
            nothing = dict.fromkeys(("snapshot", "run_id", "created_at"))
            return {"version": BASE_VERSION, "base": self._base.name, **nothing}
        return asdict(self.supervisor.versions.load(version))

    def judgement(self, version: str) -> Mapping[str, Any] | None:
        """What its evaluation says of a version; None for the base. Raises VersionNotFound, VersionDamaged."""
        if version == BASE_VERSION:
            return None
        versions = self.supervisor.versions
        return judgement(versions.load(version), versions.evaluation(version))

    def served(self, version: str) -> ServedVersion:
        """What the engine needs to serve `version`, its files verified. Raises VersionDamaged, VersionNotFound.

        In both forms where both are there; a directory that is still to be converted or downloaded is the builder's.
        """
        directory = None if self._base.directory is None else str(self._base.directory)
        base = ServedVersion(version, base_gguf=served_gguf(self._settings, self._base), base_model=directory)
        if version == BASE_VERSION:
            return base
        versions = self.supervisor.versions
        versions.verify(version)
        checkpoint = versions.model_directory(version)
        if checkpoint is not None:
            return ServedVersion(
                version,
                base_gguf=versions.model_gguf(version),
                checkpoint=checkpoint,
                canaries=self._canaries(version),
            )
        return replace(
            base,
            adapter_gguf=versions.adapter_gguf(version),
            adapter_directory=versions.adapter_directory(version),
            canaries=self._canaries(version),
        )

    # --- trials and strengths: numpy and scipy are imported only when there is something to judge --------------------

    def raters(self, version: str) -> Collection[str] | None:
        """Whose preferences a version was trained on; None where its snapshot is gone."""
        if version == BASE_VERSION:
            return frozenset()
        snapshot = self.supervisor.versions.load(version).snapshot
        found = snapshots.raters_of(self._settings.data_dir / "snapshots" / snapshot)
        ids = self._ids()
        return None if found is None else frozenset(ids.get(rater, rater) for rater in found)

    def trial_rules(self, challenger: str, champion: str, max_votes: int) -> Mapping[str, Any]:
        """The rules of a new trial; half of the bet leans on the held-out evaluation, where there is one of the two."""
        from trainer.sequential import Rules, bets

        evaluation = {} if challenger == BASE_VERSION else self.supervisor.versions.load(challenger).evaluation
        if evaluation.get("champion") != champion:
            return asdict(Rules(max_votes=max_votes))
        return asdict(Rules(max_votes=max_votes, weights=bets(evaluation["wins"], evaluation["losses"])))

    def look(
        self, wins: int, ties: int, losses: int, rules: Mapping[str, Any], versions: tuple[str, str]
    ) -> Mapping[str, Any]:
        """What the votes of a trial say."""
        from trainer.sequential import Rules, look, sentence

        known = Rules(**rules)
        seen = look(wins, ties, losses, known)
        return {
            "win_rate": seen.win_rate,
            "interval": list(seen.interval),
            "e_better": seen.e_better,
            "e_worse": seen.e_worse,
            "outcome": seen.outcome,
            "sentence": sentence(seen, known, *versions),
        }

    def strength(
        self, comparisons: Sequence[Comparisons], champion: str, promotions: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The strength of every version against the base, in the order they were made."""
        from trainer.strength import as_body, fit

        made = {str(manifest["version"]): manifest["created_at"] for manifest in self.manifests()}
        return as_body(fit(comparisons, BASE_VERSION, list(made)), champion, promotions, made)

    # --- raters ------------------------------------------------------------------------------------------------------

    def next_rows(self) -> Mapping[str | None, int]:
        """How many train rows of whom a snapshot of now has, as the default recipe mixes it."""
        mix = load_recipe(DEFAULT, self.supervisor.own_recipes).mix(seed=0)
        try:
            parts = preview(self._settings, self._store, None, mix)
        except NotEnoughPreferences:
            return {}
        return Counter(parts[TRAIN]["rater"].to_pylist())

    def last_effects(self) -> Mapping[str, Any] | None:
        """What the newest evaluation of real preferences says without each rater."""
        for run in self.supervisor.runs():
            evaluation = run.evaluation if run.config.practice is None else None
            if evaluation is not None and "raters" in evaluation:
                named = {"run_id": run.run_id, "version": evaluation["candidate"], "champion": evaluation["champion"]}
                ids = self._ids()
                return {
                    **named,
                    "raters": [{**one, "rater": ids.get(one["rater"], one["rater"])} for one in evaluation["raters"]],
                }
        return None

    def _ids(self) -> Mapping[str, str]:
        """Ids by label: files from before people had ids name them so."""
        return {label: person_id for person_id, label in self._store.labels().items()}

    def suspect(self, evidence: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Shares with intervals, and what looks suspicious."""
        from trainer.suspicion import Evidence, share_of, suspicions

        found = {rater: Evidence(**counted) for rater, counted in evidence.items()}
        sentences = suspicions(found)
        return {
            rater: {
                "gold": share_of(one.gold_right, one.gold_answered),
                "agreement": share_of(one.agreed, one.compared),
                "first": share_of(one.first, one.first + one.second),
                "suspicions": sentences[rater],
            }
            for rater, one in found.items()
        }

    def _canaries(self, version: str) -> tuple[Canary, ...]:
        """How a version began its answers when it was judged; the scripted engine has no weights that could tell."""
        if self._settings.engine == "scripted":
            return ()
        recorded = self.supervisor.versions.canaries(version)
        return tuple(Canary(tuple(one["messages"]), one["begins"], one["prompt"]) for one in recorded)

    def verdicts(self) -> Sequence[Mapping[str, Any]]:
        """The runs that ended with the verdict `promote`, newest first."""
        found = []
        for run in self.supervisor.runs():
            record = run.record
            verdict = record.get("verdict") or {}
            if record["state"] == RunState.FINISHED and verdict.get("decision") == "promote":
                made = {"run_id": run.run_id, "version": record["version"], "champion": record["champion"]}
                found.append({**made, "reasons": verdict["reasons"], "ended_at": record["finished_at"]})
        return found

    def started_by(self, version: str) -> str | None:
        """Who started the run that made a version; None for the base, and where the run or its version is gone."""
        if version == BASE_VERSION:
            return None
        try:
            return self.supervisor.run(self.supervisor.versions.load(version).run_id).config.requested_by
        except TrainerError:
            return None

    def report(self, run_id: str) -> Path:
        """The report of a run that has ended, written now where it is not there. Raises RunNotFound, BadRunRequest."""
        run = self.supervisor.run(run_id)
        if run.is_active:
            raise BadRunRequest(
                f"Run {run_id} is {run.state.value}: its report is written when it has ended. "
                f"Watch it meanwhile with `zloop runs {run_id} --follow`."
            )
        return _report_of(run)

    def evaluation_report(self, evaluation_id: str) -> Path:
        """The report of an evaluation or a benchmark, written now where it is not there. Raises EvaluationNotFound."""
        return _report_of(Run(self.supervisor.evaluation_directory(evaluation_id)))

    def worth(self, champion: str, train_rows: int, new: int, percent_agreement: float | None) -> dict[str, Any]:
        """What the default recipe on `train_rows` rows is expected to gain over `champion`."""
        check_training_available()
        recipe = load_recipe(DEFAULT)
        rows = min(train_rows, recipe.total_steps(train_rows) * recipe.batch_size)
        runs = judged_runs(self.supervisor.runs(), self._base.name)
        return expect(runs, champion, rows, new, percent_agreement=percent_agreement).as_dict()

    def evaluate(self, version: str, against: str) -> dict[str, Any]:
        evaluation = self.supervisor.evaluate(version, against)
        return {
            "version": version,
            "against": against,
            "evaluation_id": evaluation["evaluation_id"],
            "evaluation": {key: value for key, value in evaluation.items() if key not in ("results", "canaries")},
            "verdict": decide(evaluation, against, version).as_dict(),
            "report": self._report_path(evaluation["evaluation_id"]),
        }

    def benchmark(
        self, benchmark: str, version: str, against: str | None, *, limit: int | None = None, max_tokens: int
    ) -> dict[str, Any]:
        """What a benchmark says of a version; alpaca-eval compares, by default with the champion."""
        check_training_available()
        if against is None and benchmark == ALPACA_EVAL:
            against = self._store.champion()
        result = self.supervisor.benchmark(Asked(benchmark, version, against, limit, max_tokens))
        shown = {key: value for key, value in result.items() if key not in ("graded", "compared")}
        return {**shown, "tables": tables(result), "report": self._report_path(result["evaluation_id"])}

    def benchmark_names(self) -> Sequence[str]:
        """The benchmarks that have a name."""
        return tuple(SOURCES)

    def _report_path(self, evaluation_id: str) -> str | None:
        path = self.supervisor.evaluation_directory(evaluation_id) / REPORT
        return str(path) if path.is_file() else None

    def compare_with_base(self, versions: Sequence[str]) -> dict[str, Any]:
        """Each version against the base, one table. Raises BadRunRequest for practice versions beside real ones."""
        versions = [version for version in dict.fromkeys(versions) if version != BASE_VERSION]
        if not versions:
            raise BadRunRequest(f"{BASE_VERSION} is what versions are compared with. Name at least one other version.")
        manifests = {version: self.supervisor.versions.load(version) for version in versions}
        tastes = {manifest.practice for manifest in manifests.values()}
        if len(tastes) > 1:
            raise BadRunRequest(f"{', '.join(versions)}: a practice is judged on pairs of its own. Compare them apart.")
        evaluations = [self.supervisor.evaluate(version, BASE_VERSION) for version in versions]
        return {
            "rows": table(evaluations, {version: manifest.recipe for version, manifest in manifests.items()}),
            "snapshots": sorted({evaluation["snapshot"] for evaluation in evaluations}),
        }

    def credit(self, version: str, rater: str) -> str | None:
        """What a rater's judgements did for a version, in a sentence; None where it learned nothing from them."""
        if version == BASE_VERSION:
            return None
        try:
            found = credits_of(version, self.supervisor.versions, self._settings.data_dir / "snapshots")
        except TrainerError:  # a version that is damaged must not cost anybody their pick
            return None
        credit = found.get(rater) or found.get(self._store.labels().get(rater, rater))
        return None if credit is None else credit.sentence


def judge_of(settings: Settings) -> Judge | None:
    """The model that judges answers in benchmarks, None where none is configured."""
    if settings.judge_url is None or settings.judge_model is None:
        return None
    token = "" if settings.judge_token is None else settings.judge_token.get_secret_value()
    return Judge(settings.judge_url, settings.judge_model, token)


def _report_of(run: Run) -> Path:
    """Raises TrainingUnavailable where it cannot be written."""
    path = run.directory / REPORT
    written = path if path.is_file() else ensure_report(run)
    if written is None:
        raise TrainingUnavailable(f"The report of {run.run_id} could not be written; the server's log says why.")
    return written


def _described(name: str, own: Path) -> dict[str, Any]:
    """A recipe for people who choose one."""
    try:
        recipe = load_recipe(name, own)
    except BadRecipe as error:
        return {"name": name, "method": None, "tuning": None, "about": "", "error": str(error)}
    return {"name": name, "method": recipe.method, "tuning": recipe.tuning, "about": recipe.about, "error": None}


def schedule_book(settings: Settings) -> ScheduleBook:
    """The schedule of the settings, and what was changed and decided since. Raises SettingsError."""
    try:
        standard = Schedule(
            cron=settings.retrain_cron,
            every=settings.retrain_every,
            at_least=settings.retrain_at_least,
            quiet=settings.quiet_hours,
            time_zone=get_localzone_name() if settings.time_zone == "local" else settings.time_zone,
        )
        return ScheduleBook(settings.data_dir, standard)
    except BadSchedule as error:
        raise SettingsError(f"The schedule (ZLOOP_RETRAIN_…, ZLOOP_QUIET_HOURS, ZLOOP_TIME_ZONE): {error}") from error


def room_of(device: str) -> Room | None:
    """Free and total memory, as the engines count it: within the limits of a container."""
    return Room(available_bytes(), total_bytes()) if device == "cpu" else machine_room(device)


def freeze(settings: Settings, store: FeedbackStore, practice_taste: str | None, mix: Mix) -> snapshots.Snapshot:
    """Freeze the present preferences, real ones as the mix says, or those of a practice taste.

    The rated answers are frozen with them where the mix learns from these.
    """
    with store.freezing:
        return snapshots.freeze(
            store.training_rows(practice_taste),
            settings.data_dir / "snapshots",
            practice_taste,
            mix,
            evaluation_prompts=load_evaluation_prompts(settings.data_dir / FOLDER),
            redact=settings.redact,
            ratings=_ratings(store, practice_taste, mix),
            standing=store.standing(),
        )


def preview(
    settings: Settings, store: FeedbackStore, practice_taste: str | None, mix: Mix
) -> Mapping[str, Any]:  # fmt: skip
    """The rows that `freeze` would write; what is private is not hidden in them, only their lengths are looked at."""
    prompts = load_evaluation_prompts(settings.data_dir / FOLDER)
    rows = store.training_rows(practice_taste)
    rated = _ratings(store, practice_taste, mix)
    return snapshots.preview(
        rows, practice_taste, mix, evaluation_prompts=prompts, redact=False, ratings=rated, standing=store.standing()
    )


def _ratings(store: FeedbackStore, practice_taste: str | None, mix: Mix) -> Sequence[UnpairedPreference]:
    return store.unpaired() if mix.learns_from == RATINGS and practice_taste is None else ()
