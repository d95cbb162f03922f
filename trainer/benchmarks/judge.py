"""A model that judges answers, over HTTP: any server that speaks OpenAI's chat completions.

    Judge(url, model, token).judge_all(requests, kept) → the texts of its judgements, in order

Through `huggingface_hub.InferenceClient`; at most `AT_ONCE` requests at a time; greedy. A refusal that may pass (429,
5xx, a timeout, no connection) is tried again with growing pauses, `TRIES` times, as tenacity does it; a `Retry-After`
is kept to. Each judgement is kept when it comes, so that a judge that fails costs only what it did not say.

The token is in no message, log, file or repr. Not covered: judges that need another API; a server that sends its
answer a byte at a time for ever (each wait is limited, their sum is not).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from trainer.benchmarks.kept import Kept, key_of
from trainer.errors import JudgeFailed

AT_ONCE = 4
TRIES = 5
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
TIMEOUT_S = 120.0  # without a byte
MAX_TOKENS = 512  # of a judgement
# Sent where no token is set: with an empty one the hub's client would send this machine's Hugging Face token.
_NO_TOKEN = "no-token"  # noqa: S105
_SAID = 200  # characters of a refusal that are shown

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Judge:
    """Which model judges, and where. `pause_s` is the first pause before another try."""

    url: str
    model: str
    token: str = field(default="", repr=False)
    pause_s: float = PAUSE_S
    timeout_s: float = TIMEOUT_S

    def key(self, messages: Messages) -> str:
        """What tells a judgement from any other: the judge and all it is asked."""
        return key_of(self.url, self.model, MAX_TOKENS, [dict(message) for message in messages])

    def judge_all(
        self, requests: Sequence[Messages], kept: Kept, done: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """The judgement of each request. `done` is told how many there are so far.

        Raises JudgeFailed when one of them cannot be had; what was judged until then is in `kept`.
        """
        missing = {self.key(one): one for one in requests if kept.get(self.key(one)) is None}
        counting, count = threading.Lock(), len(requests) - len(missing)
        failed = threading.Event()
        done(count)

        def one(key: str, messages: Messages) -> None:
            nonlocal count
            if failed.is_set():
                return
            try:
                text = self._asked(messages)
            except Exception:
                failed.set()  # the others finish what they asked, and ask nothing new
                raise
            kept.add(key, text)
            with counting:
                count += 1
                done(count)

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="judge") as pool:
            asked = [pool.submit(one, key, messages) for key, messages in missing.items()]
            wait(asked, return_when=FIRST_EXCEPTION)
        broken = next((error for future in asked if (error := future.exception()) is not None), None)
        if broken is not None:
            there = sum(kept.get(self.key(one)) is not None for one in requests)
            raise JudgeFailed(
                f"The judge {self.model} at {self.url} failed after {there} of {len(requests)} judgements: "
                f"{self._in_words(broken)}. What was judged is kept: run the same command again and it goes on there."
            ) from None
        return [kept.get(self.key(one)) or "" for one in requests]

    def _asked(self, messages: Messages) -> str:
        from huggingface_hub import InferenceClient
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        client = InferenceClient(base_url=self.url, api_key=self.token or _NO_TOKEN, timeout=self.timeout_s)
        tries = Retrying(
            retry=retry_if_exception(_may_pass), stop=stop_after_attempt(TRIES), wait=self._pause, reraise=True
        )
        answer: Any = tries(
            client.chat_completion,
            [dict(message) for message in messages],
            model=self.model,
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            seed=0,
        )
        return str(answer.choices[0].message.content or "")

    def _pause(self, state: Any) -> float:
        """Seconds before the next try: growing and jittered, or what the server asks for."""
        from tenacity import wait_random_exponential

        response = getattr(state.outcome.exception(), "response", None)
        asked = "" if response is None else response.headers.get("retry-after", "")
        if re.fullmatch(r"\d+(\.\d+)?", asked):
            return min(float(asked), LONGEST_PAUSE_S)
        return float(wait_random_exponential(multiplier=self.pause_s, max=LONGEST_PAUSE_S)(state))

    def _in_words(self, error: BaseException) -> str:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            return f"it refused the token ({response.status_code}); set ZLOOP_JUDGE_TOKEN to one it knows"
        if response is not None:
            said = " ".join(response.text.split())[:_SAID]
            words = f"status {response.status_code}, {said or 'without a reason'}"
        elif isinstance(error, TimeoutError):
            words = f"no answer within {self.timeout_s:g} s"
        elif isinstance(error, AttributeError | IndexError | TypeError | ValueError | KeyError):
            words = f"it answered with what is no chat completion ({type(error).__name__}); is the URL right?"
        else:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"
        return words.replace(self.token, "…") if self.token else words


def _may_pass(error: BaseException) -> bool:
    from httpx2 import TransportError

    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code == 429 or response.status_code >= 500)
    return isinstance(error, TimeoutError | TransportError)
