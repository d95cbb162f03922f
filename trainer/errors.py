"""The error tree of the trainer.

    TrainerError
    ├── UnknownRecipe          no recipe of that name
    ├── BadRecipe              a recipe key or value that is not allowed
    ├── BadRunRequest          a run (or its cancelling) that cannot be asked for like this
    ├── BadSchedule            a cron expression, hours or numbers that are not allowed
    ├── NotEnoughMemory        a run certainly does not fit
    ├── RunActive              another run is going on; `.run` is that run
    ├── RunNotFound
    ├── VersionNotFound
    ├── EvaluationNotFound
    ├── VersionDamaged         files and manifest disagree
    ├── TrainingUnavailable    torch, trl, … are not installed
    ├── BaseModelMissing       the base's file or package is not there
    ├── NotEnoughDisk          a run would need more room than there is
    ├── ChildFailed            a training or evaluating child ended without its result
    ├── JudgeFailed            a judge did not answer, or refused
    ├── LaunchFailed           Slurm or Ray did not take a job
    ├── DeadlinePassed         a run took longer than its recipe allows
    └── JobError               raised inside a child; its sentence becomes the run's error
        ├── WrongProcessCount
        ├── WrongStrategy      accelerate started something else than was asked for
        ├── WrongStart         the first loss was not what the method makes it
        ├── Diverged           loss or gradient norm stopped being finite
        ├── OutOfMemory
        ├── DiskFull
        └── NothingToTrainOn   every row was too long

Messages say what, the value, the limit and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.runs import Run


class TrainerError(Exception):
    """Everything this package raises on purpose."""


class UnknownRecipe(TrainerError):
    pass


class BadRecipe(TrainerError):
    pass


class BadRunRequest(TrainerError):
    pass


class BadSchedule(TrainerError):
    pass


class NotEnoughMemory(TrainerError):
    pass


class RunActive(TrainerError):
    """One run at a time: `run` is the active one."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"Run {run.run_id} is {run.state.value}: wait for it or cancel it, then ask again.")
        self.run = run


class RunNotFound(TrainerError):
    def __init__(self, run_id: str) -> None:
        super().__init__(f"There is no run {run_id!r}. The list of runs names those that exist.")
        self.run_id = run_id


class VersionNotFound(TrainerError):
    def __init__(self, version: str) -> None:
        super().__init__(f"There is no version {version!r}. The list of versions names those that exist.")
        self.version = version


class EvaluationNotFound(TrainerError):
    def __init__(self, evaluation_id: str) -> None:
        super().__init__(f"There is no evaluation {evaluation_id!r}. `zloop evaluate` says the id of each it makes.")
        self.evaluation_id = evaluation_id


class VersionDamaged(TrainerError):
    pass


class TrainingUnavailable(TrainerError):
    pass


class BaseModelMissing(TrainerError):
    pass


class NotEnoughDisk(TrainerError):
    pass


class ChildFailed(TrainerError):
    pass


class JudgeFailed(TrainerError):
    pass


class LaunchFailed(TrainerError):
    pass


class DeadlinePassed(TrainerError):
    pass


class JobError(TrainerError):
    pass


class WrongProcessCount(JobError):
    pass


class WrongStrategy(JobError):
    pass


class WrongStart(JobError):
    pass


class Diverged(JobError):
    pass


class OutOfMemory(JobError):
    pass


class DiskFull(JobError):
    pass


class NothingToTrainOn(JobError):
    pass
