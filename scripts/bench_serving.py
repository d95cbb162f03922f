"""The whole product against what people use otherwise, on the same weights, in one run → docs/benchmarks/serving.md.

    make bench-serving                  (scripts/bench_serving.py --short for a look that is not kept)

The product is a real `zloop serve` with the embedded model, asked over its HTTP API. Beside it stand a bare
llama-server (the same native library, file, threads and context, asked directly), eager `model.generate`,
`transformers serve` and a naive Gradio chat, these three on the same weights dequantised. Each comparison goes in
turns, and medians are told. Every answer compared is cut at the same number of tokens; a round in which one ended by
itself is asked again. Servers started here are stopped here.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server import Server, environment, free_port, serving  # noqa: E402

from trainer.base_model import embedded, ensure_base  # noqa: E402
from trainer.gguf_adapter import write_gguf_adapter  # noqa: E402
from trainer.served_model import ensure_served  # noqa: E402
from trainer.versions import Versions  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "serving.md"
SUBJECTS = ("a boat", "a lighthouse", "a mountain village", "an old clock", "a lost dog", "a night train")
TEMPERATURE = 0.7
READY_S = 120.0
numbers = count(1)


@dataclass(frozen=True)
class Size:
    """How much is asked: rounds, tokens of an answer, users at once."""

    rounds: int = 5
    tokens: int = 96
    users: int = 16


@dataclass(frozen=True)
class Told:
    """One answer, seen from outside: seconds to the first text and to the end, and why it ended."""

    first_s: float
    whole_s: float
    finish_reason: str | None


@dataclass(frozen=True)
class Line:
    """One line of the report. `ratio` is what the target speaks about."""

    what: str
    ours: str
    theirs: str
    ratio: float
    target: str
    met: bool
    n: int


@dataclass(frozen=True)
class Target:
    """A chat completions endpoint."""

    url: str
    headers: dict[str, str]
    model: str


def question() -> str:
    """A question nobody asked before, whose answer does not end soon."""
    number = next(numbers)
    return f"Write a very long story about {SUBJECTS[number % len(SUBJECTS)]}, in many chapters. Variant {number}."


async def stream(target: Target, words: str, tokens: int, seed: int) -> Told:
    """Ask for one answer and read it to its end."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": words}],
        "user": f"user {seed}",
        "max_tokens": tokens,
        "temperature": TEMPERATURE,
        "top_p": 0.95,
        "seed": seed,
        "stream": True,
    }
    began, first, finish_reason = time.perf_counter(), None, None
    url = f"{target.url}/v1/chat/completions"
    async with (
        httpx.AsyncClient(timeout=600, trust_env=False) as http,
        http.stream("POST", url, json=body, headers=target.headers) as answer,
    ):
        if answer.is_error:
            raise RuntimeError(f"{target.url}: {answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                finish_reason = choice.get("finish_reason") or finish_reason
                if first is None and choice.get("delta", {}).get("content"):
                    first = time.perf_counter() - began
    return Told(first or 0.0, time.perf_counter() - began, finish_reason)


def ask(target: Target, streams: int, tokens: int) -> list[Told]:
    """Several answers at once, all of them cut at `tokens`."""

    async def at_once() -> list[Told]:
        asked = [(question(), next(numbers)) for _ in range(streams)]
        return await asyncio.gather(*(stream(target, words, tokens, seed) for words, seed in asked))

    for _ in range(5):
        told = asyncio.run(at_once())
        if all(one.finish_reason in ("length", None) for one in told):
            return told
    raise RuntimeError(f"{target.url}: answers end before {tokens} tokens, five times in a row")


def rate(target: Target, streams: int, tokens: int) -> float:
    """Tokens a second of all streams together."""
    return streams * tokens / max(one.whole_s for one in ask(target, streams, tokens))


def in_turns(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each, measured in turns."""
    told = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(each) for each in zip(*told, strict=True)]


# --- who is compared -------------------------------------------------------------------------------------------------


@contextmanager
def running(command: Sequence[str], log: Path, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the block ends."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment(log.parent)
        )
    try:
        deadline = time.monotonic() + READY_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Something says 200 there."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


@contextmanager
def bare_llama(gguf: Path, work: Path) -> Iterator[Target]:
    """The native server with the product's settings and nothing of the product before it."""
    from chat_app.serving import llama_engine
    from chat_app.serving.engine import ServedVersion

    log, _ = llama_engine._ensure_log(work, "bare")
    process = llama_engine._spawn(log)
    try:
        config = llama_engine._config(ServedVersion("bare", gguf), "bare", None)
        yield Target(llama_engine._hand_over(process, config), {"Authorization": "Bearer bare"}, "bare")
    finally:
        llama_engine.stop_process(process)


@contextmanager
def transformers_serve(directory: Path, work: Path, *options: str) -> Iterator[Target]:
    """`transformers serve` on the dequantised weights."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(directory), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", *options]
    url = f"http://127.0.0.1:{port}"
    with running(command, work / "transformers-serve.log", partial(answers, f"{url}/health")):
        yield Target(url, {}, str(directory))


def eager(directory: Path, dtype_name: str) -> Callable[[int], float]:
    """`model.generate` as it stands: tokens a second of one answer of so many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype_name))

    def measure(tokens: int) -> float:
        asked = [{"role": "user", "content": question()}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        began = time.perf_counter()
        model.generate(**ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=True, temperature=TEMPERATURE)
        return tokens / (time.perf_counter() - began)

    return measure


def first_of_gradio(url: str, users: int) -> float:
    """Median seconds to the first text of `users` that ask a Gradio chat at once."""
    from gradio_client import Client

    client = Client(url, verbose=False)
    began = time.perf_counter()
    jobs = [client.submit(question(), api_name="/chat") for _ in range(users)]
    first: dict[int, float] = {}
    while len(first) < users:
        for number, job in enumerate(jobs):
            if number not in first and (job.outputs() or job.done()):
                job.exception() if job.done() else None
                first[number] = time.perf_counter() - began
        time.sleep(0.01)
    for job in jobs:
        job.result()
    return statistics.median(first.values())


def publish_versions(data_dir: Path, directory: Path, names: Sequence[str]) -> None:
    """Versions on disk as a run leaves them: small random adapters, published by the product's own code."""
    from test_versions import VERDICT, trained_run
    from tiny_model import random_adapter

    for seed, name in enumerate(names):
        work = data_dir / "made-up" / name
        work.mkdir(parents=True)
        run = trained_run(work, run_id=f"run_20260101-00000{seed}_{seed:04}")
        shutil.rmtree(run.directory / "adapter")
        random_adapter(directory, run.directory / "adapter", seed=seed, scale=0.01)
        write_gguf_adapter(run.directory / "adapter", directory, run.directory / "adapter.gguf")
        Versions(data_dir / "versions").publish(run, name, VERDICT)
    shutil.rmtree(data_dir / "made-up")


# --- what is measured ------------------------------------------------------------------------------------------------


def line(what: str, ours: float, theirs: float, target: tuple[str, float], *, n: int, unit: str) -> Line:
    """`target`: `>=` wants ours/theirs at least that; `<=` at most; `sooner` wants theirs/ours at least that."""
    relation, limit = target
    ratio = theirs / ours if relation == "sooner" else ours / theirs
    met = ratio <= limit if relation == "<=" else ratio >= limit
    told = {">=": f"≥ {limit:g}×", "<=": f"≤ {limit:g}×", "sooner": f"≥ {limit:g}× sooner"}[relation]
    return Line(what, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", ratio, told, met, n)


def throughput(product: Target, gguf: Path, directory: Path, work: Path, size: Size) -> Iterator[Line]:
    """One stream and eight, against the bare server, eager generate and `transformers serve`."""
    with bare_llama(gguf, work) as bare:
        for target in (product, bare):
            ask(target, 1, 8)
        for streams in (1, 8):
            ours, theirs = in_turns(
                size.rounds, partial(rate, product, streams, size.tokens), partial(rate, bare, streams, size.tokens)
            )
            what = f"{streams} stream{'s' if streams > 1 else ''} against a bare llama-server"
            yield line(what, ours, theirs, (">=", 0.9), n=size.rounds, unit="tokens/s")
    for dtype in ("float32", "bfloat16"):
        measure = eager(directory, dtype)
        measure(4)
        ours, theirs = in_turns(size.rounds, partial(rate, product, 1, size.tokens), partial(measure, size.tokens))
        yield line(
            f"1 stream against eager `generate`, {dtype}", ours, theirs, (">=", 4), n=size.rounds, unit="tokens/s"
        )
        del measure
    for options in ((), ("--continuous-batching",)):
        with transformers_serve(directory, work, *options) as served:
            ask(served, 1, 4)
            ours, theirs = in_turns(
                size.rounds, partial(rate, product, 8, size.tokens), partial(rate, served, 8, size.tokens)
            )
        what = f"8 streams against `transformers serve {' '.join(options)}".rstrip() + "`"
        yield line(what, ours, theirs, (">=", 6), n=size.rounds, unit="tokens/s")


def pairs(server: Server, limit: float, what: str, size: Size) -> Line:
    """A pair against one answer, both whole, asked of the same product."""

    def one() -> float:
        began = time.perf_counter()
        told = server.chat(question(), max_tokens=size.tokens, temperature=TEMPERATURE)["choices"][0]["finish_reason"]
        return time.perf_counter() - began if told == "length" else one()

    def pair() -> float:
        began = time.perf_counter()
        told = server.pair(question(), max_tokens=size.tokens, temperature=TEMPERATURE)["candidates"]
        if any(candidate["finish_reason"] != "length" for candidate in told):
            return pair()
        return time.perf_counter() - began

    one(), pair()
    ours, theirs = in_turns(size.rounds, pair, one)
    return line(what, ours, theirs, ("<=", limit), n=size.rounds, unit="s")


def first_tokens(product: Target, directory: Path, work: Path, size: Size) -> Line:
    """The first token with many users at once, against the naive chat."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(ROOT / "scripts" / "naive_gradio.py"), str(directory), str(port), str(size.tokens)]

    def ours() -> float:
        return statistics.median(one.first_s for one in ask(product, size.users, size.tokens))

    with running(command, work / "gradio.log", partial(answers, url)):
        first_of_gradio(url, 1)
        rounds = min(size.rounds, 3)  # the naive chat takes minutes a round
        sooner, later = in_turns(rounds, ours, partial(first_of_gradio, url, size.users))
    what = f"first token at {size.users} users (median of them) against naive Gradio + `generate`"
    return line(what, sooner, later, ("sooner", 8), n=rounds, unit="s")


def swaps(server: Server, product: Target, directory: Path, work: Path, size: Size) -> Iterator[Line]:
    """A version that lies ready: from the order to its first token, against starting `transformers serve` again.

    Each is served for the first time: one that was the champion before would still be warm.
    """
    ready = iter(version_names(size))

    def promoted() -> float:
        version = next(ready)
        began = time.perf_counter()
        server.post(f"/v1/versions/{version}/promote")
        ordered = time.perf_counter() - began
        return ordered + ask(product, 1, 4)[0].first_s

    with ExitStack() as held:
        held.enter_context(transformers_serve(directory, work))

        def restarted() -> float:
            began = time.perf_counter()
            held.close()
            served = held.enter_context(transformers_serve(directory, work))
            started = time.perf_counter() - began
            return started + ask(served, 1, 4)[0].first_s

        ours, theirs = in_turns(size.rounds, promoted, restarted)
    what = "first token of a version ready on disk, against a restart of `transformers serve`"
    yield line(what, ours, theirs, ("sooner", 20), n=size.rounds, unit="s")
    yield Line("the same, in seconds", f"{ours:.2f} s", "", ours, "≤ 2 s", ours <= 2, size.rounds)


def version_names(size: Size) -> list[str]:
    """One version a round."""
    return [f"v{number}" for number in range(1, size.rounds + 1)]


PARTS = ("throughput", "pair", "first", "swap")


def measure(work: Path, size: Size, parts: Sequence[str]) -> Iterator[Line]:
    """Every line, as it is measured."""
    base = embedded()
    data_dir = work / "data"
    directory = ensure_base(base, data_dir / "models")
    gguf = ensure_served(base, data_dir / "models")
    publish_versions(data_dir, directory, version_names(size))
    with ExitStack() as stack:
        server = stack.enter_context(serving(data_dir, retrain_every=0))
        server.http.timeout = httpx.Timeout(600)
        product = Target(server.url, {}, "champion")
        ask(product, 1, 8)
        if "throughput" in parts:
            yield from throughput(product, gguf, directory, work, size)
        if "pair" in parts:
            yield pairs(server, 1.6, "a pair against one answer, engine `llama`", size)
        if "first" in parts:
            yield first_tokens(product, directory, work, size)
        if "swap" in parts:
            yield from swaps(server, product, directory, work, size)
    if "pair" in parts:
        if find_spec("chat_app.serving.transformers_engine") is None:
            print("the engine `transformers` is not there: its pair was not measured", file=sys.stderr)
        else:
            with serving(data_dir, retrain_every=0, engine="transformers") as server:
                server.http.timeout = httpx.Timeout(600)
                yield pairs(server, 1.3, "a pair against one answer, engine `transformers`", size)


def row(told: Line) -> str:
    """One line of the table."""
    verdict = "yes" if told.met else "**no**"
    return f"| {told.what} | {told.ours} | {told.theirs} | {told.ratio:.2f} | {told.target} | {verdict} | {told.n} |"


def main() -> None:
    """Measure and write the report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="one small round of everything, printed and not kept")
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="printed and not kept")
    given = options.parse_args()
    size = Size(rounds=1, tokens=16, users=4) if given.short else Size()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for told in measure(Path(place), size, given.only):
            rows.append(row(told))
            print(rows[-1], flush=True)
    page = f"""# Serving

`make bench-serving`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}). The embedded model;
{size.tokens} tokens an answer, {TEMPERATURE:g} temperature, medians of n rounds in turns. The product is asked over its
HTTP API; the bare llama-server has the same file, threads and context; the others have the same weights dequantised.

| what | the product | the other | ratio | target | met | n |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    if not given.short and tuple(given.only) == PARTS:
        REPORT.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
