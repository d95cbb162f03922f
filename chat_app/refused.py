"""A refusal that is about the moment and not about what was asked for: every edge shows its sentence.

Where it sits: raised by the operations (`operations.py` and its parts), turned into a status by `api.py`.
"""


class Refused(Exception):
    """A request that cannot be met as things stand; `status` is the HTTP status, the message a sentence for people.

    `param`: what of the request is to blame.
    """

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.param = param
