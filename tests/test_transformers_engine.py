"""The in-process engine for real: tiny models, adapters side by side, many answers at once, and how it all ends."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from symbol_models import BASE_SYMBOL, symbol_adapter, symbol_base
from tiny_model import CONTEXT, END_OF_ANSWER, random_adapter, session_directory, shared_directory

from chat_app.serving import base_loading, model_host
from chat_app.serving.engine import (
    Chunk,
    ContextOverflow,
    EngineBroken,
    EngineRefused,
    EngineStartFailed,
    NoRoom,
    Sampling,
    ServedVersion,
    VersionUnservable,
)
from chat_app.serving.model_host import ModelHost
from chat_app.serving.slot import ModelSlot
from chat_app.serving.transformers_engine import TransformersEngine, TransformersEngines
from feedback_store.records import Message

# PEFT, which makes the adapters here, asks transformers for a name it has renamed: upstream's to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LONG = Sampling(temperature=0, max_tokens=1500)
QUESTIONS = ["What is red?", "Count to seven, slowly please.", "Why?", "One two three four five six seven. " * 12]

Work = Callable[..., Awaitable[None]]


def asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


@cache
def tiny_adapter(number: int) -> Path:
    return random_adapter(shared_directory(), session_directory() / f"adapter-{number}", seed=number)


def tiny(version: str = "v0", adapter: int | None = None) -> ServedVersion:
    directory = None if adapter is None else tiny_adapter(adapter)
    return ServedVersion(version, base_model=str(shared_directory()), adapter_directory=directory)


@cache
def endless(symbol: str = BASE_SYMBOL) -> ServedVersion:
    """A version that says its symbol for ever."""
    base = symbol_base(session_directory() / "symbols")
    out = session_directory() / f"symbol-{symbol}"
    adapter = None if symbol == BASE_SYMBOL else symbol_adapter(base, symbol, out)
    return ServedVersion(symbol, base_model=str(base.directory), adapter_directory=adapter)


def serve(work: Work, *versions: ServedVersion) -> None:
    """Run `work` on an engine for each version and see that nothing stays behind."""

    async def run() -> None:
        engines = TransformersEngines(precision="fp32")
        built = [await engines.build(served) for served in versions or (tiny(),)]
        hosts = {engine._host for engine in built}
        try:
            async with asyncio.timeout(60):
                await work(*built)
        finally:
            for engine in built:
                await engine.close()
        assert not any(engine.is_alive for engine in built)
        assert not any(host._worker.is_alive() for host in hosts)
        assert not engines._hosts

    asyncio.run(run())


async def chunks(engine: TransformersEngine, sampling: Sampling, question: str = QUESTIONS[0]) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(asked(question), sampling)]


async def said(engine: TransformersEngine, sampling: Sampling, question: str = QUESTIONS[0]) -> str:
    return "".join(chunk.text for chunk in await chunks(engine, sampling, question))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (a thread, not a task: no Event)
            await asyncio.sleep(0.005)


@cache
def generated(adapter: int | None, question: str, tokens: int = 24) -> str:
    """The greedy answer of transformers' own `generate`, with PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(shared_directory(), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, tiny_adapter(adapter))
    tokenizer = AutoTokenizer.from_pretrained(shared_directory())
    prompt = tokenizer.apply_chat_template(
        asked(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.eval().generate(
        **prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=END_OF_ANSWER, pad_token_id=END_OF_ANSWER
    )
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).rstrip("\ufffd")


GREEDY = Sampling(temperature=0, max_tokens=24)


def test_greedy_text_is_that_of_generate_alone_and_in_a_mixed_batch() -> None:
    versions = [tiny("v0"), tiny("v1", 1), tiny("v10", 10)]
    numbers = [None, 1, 10]
    wanted = {(version, question): generated(version, question) for version in numbers for question in QUESTIONS}
    assert len(set(wanted.values())) > 6  # the adapters matter, the questions matter

    async def work(*engines: TransformersEngine) -> None:
        for engine, number in zip(engines, numbers, strict=True):
            assert await said(engine, GREEDY) == wanted[number, QUESTIONS[0]]
        everything = [
            (engine, number, text) for engine, number in zip(engines, numbers, strict=True) for text in QUESTIONS
        ]
        together = await asyncio.gather(*(said(engine, GREEDY, text) for engine, _, text in everything))
        assert together == [wanted[number, text] for _, number, text in everything]
        assert engines[0]._host is engines[1]._host is engines[2]._host

    serve(work, *versions)


def test_rows_that_come_and_go_change_nothing_in_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_host.PIECE_TOKENS, "cpu", 16)  # long prompts in many pieces, between the others' tokens
    shuffle = random.Random(0)

    async def work(*engines: TransformersEngine) -> None:
        lengths = [3, 8, 17, 24, 40]
        jobs = [(shuffle.randrange(2), shuffle.choice(QUESTIONS), shuffle.choice(lengths)) for _ in range(30)]

        async def later(which: int, question: str, tokens: int) -> None:
            await until(lambda: engines[0]._host.batch.rows < 8)
            answer = await said(engines[which], Sampling(temperature=0, max_tokens=tokens), question)
            assert answer == generated([None, 1][which], question, tokens)

        await asyncio.gather(*(later(*job) for job in jobs))

    serve(work, tiny("v0"), tiny("v1", 1))


def test_no_foreign_symbol_in_200_answers_of_three_versions() -> None:
    symbols = [BASE_SYMBOL, "a", "b"]
    shuffle = random.Random(1)

    async def work(*engines: TransformersEngine) -> None:
        gate = asyncio.Semaphore(24)

        async def one(number: int) -> None:
            which, tokens = number % 3, shuffle.randint(1, 12)
            async with gate:
                answer = await said(engines[which], Sampling(1.0, 1.0, tokens, seed=number), f"Question {number // 5}")
            assert answer == symbols[which] * tokens

        await asyncio.gather(*(one(number) for number in range(200)))

    serve(work, *map(endless, symbols))


def test_it_streams_counts_and_ends_as_the_port_says() -> None:
    async def work(engine: TransformersEngine) -> None:
        assert engine.version == "v0"
        assert engine.context_tokens == CONTEXT
        *body, last = await chunks(engine, GREEDY, QUESTIONS[1])
        assert all(chunk.finish_reason is None and chunk.text for chunk in body)
        assert last.finish_reason == "length"
        assert last.usage is not None
        assert last.usage.completion_tokens == 24
        assert last.usage.prompt_tokens == await engine.prompt_tokens(asked(QUESTIONS[1])) > 10
        whole = await chunks(engine, LONG, QUESTIONS[1])
        assert whole[-1].finish_reason == "stop"
        assert "<|im_end|>" not in "".join(chunk.text for chunk in whole)
        text = "".join(chunk.text for chunk in body)
        for stop in (text[5:8], text[4:14], text[-2:]):  # across tokens, and at the very end
            stopped = await chunks(engine, Sampling(temperature=0, max_tokens=24, stop=("never", stop)), QUESTIONS[1])
            assert "".join(chunk.text for chunk in stopped) == text[: text.index(stop)]
            assert stopped[-1].finish_reason == "stop"

    serve(work)


def test_a_seed_draws_the_same_again_and_seeds_differ() -> None:
    async def work(engine: TransformersEngine) -> None:
        draws = [Sampling(1.0, 0.95, 32, seed=seed) for seed in (1, 2)]
        one, other = [await said(engine, draw) for draw in draws]
        assert one != other
        crowd = [said(engine, Sampling(seed=seed, max_tokens=40), QUESTIONS[1]) for seed in range(5)]
        together = await asyncio.gather(*(said(engine, draw) for draw in draws), *crowd)
        assert list(together[:2]) == [one, other]
        assert len({await said(engine, Sampling(1.0, max_tokens=32)) for _ in range(3)}) > 1  # no seed: any

    serve(work)


def test_a_pair_reads_its_prompt_once_also_when_the_other_begins_later() -> None:
    async def work(engine: TransformersEngine, other: TransformersEngine) -> None:
        batch = engine._host.batch
        cost = await engine.prompt_tokens(asked(QUESTIONS[3]))

        async def read_by(*requests: Awaitable[object]) -> int:
            before = batch.tokens_read
            await asyncio.gather(*requests)
            return batch.tokens_read - before

        pair = [said(engine, Sampling(seed=seed, max_tokens=8), QUESTIONS[3]) for seed in (1, 2)]
        assert await read_by(*pair) == cost
        async with aclosing(engine.stream(asked(QUESTIONS[3]), LONG)) as first:
            await anext(first)
            assert await read_by(said(engine, GREEDY, QUESTIONS[3])) == 0
            assert await said(engine, GREEDY, QUESTIONS[3]) == BASE_SYMBOL * 24
            assert await read_by(said(other, GREEDY, QUESTIONS[3])) == cost  # another version reads for itself

    serve(work, endless(), endless("a"))


def test_a_new_request_gets_its_first_token_while_others_are_written() -> None:
    async def work(engine: TransformersEngine) -> None:
        async with aclosing(engine.stream(asked(QUESTIONS[1]), LONG)) as first:
            await anext(first)
            assert await said(engine, Sampling(temperature=0, max_tokens=3)) == "zzz"
            assert engine._host.batch.rows == 1

    serve(work, endless())


def test_leaving_a_stream_frees_its_row_and_a_cancelled_task_too() -> None:
    async def work(engine: TransformersEngine) -> None:
        batch = engine._host.batch
        async with aclosing(engine.stream(asked("Long."), LONG)) as stream:
            await anext(stream)
            assert batch.rows == 1
        await until(lambda: batch.is_idle)
        task = asyncio.create_task(said(engine, LONG))
        await until(lambda: batch.rows == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: batch.is_idle)
        assert not engine._running

    serve(work, endless())


def test_too_long_a_conversation_is_refused_and_max_tokens_end_at_the_context() -> None:
    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(ContextOverflow) as caught:
            await said(engine, GREEDY, "word " * 3000)
        assert caught.value.prompt_tokens > 3000
        assert caught.value.limit == CONTEXT
        words = "word " * ((CONTEXT - await engine.prompt_tokens(asked("")) - 20) // 1)
        while (cost := await engine.prompt_tokens(asked(words))) >= CONTEXT - 5:
            words = words.removesuffix("word ")
        last = (await chunks(engine, Sampling(temperature=0, max_tokens=10**6), words))[-1]
        assert last.usage is not None
        assert last.usage.completion_tokens <= CONTEXT - cost

    serve(work)


def test_more_requests_than_places_wait_and_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chat_app.serving.batch.MAX_ROWS", 3)

    async def work(engine: TransformersEngine) -> None:
        answers = await asyncio.gather(*(said(engine, GREEDY, text) for text in QUESTIONS * 2))
        assert answers == [generated(None, text) for text in QUESTIONS * 2]

    serve(work)


def test_closing_an_engine_breaks_its_streams_and_leaves_the_others() -> None:
    async def work(base: TransformersEngine, tuned: TransformersEngine) -> None:
        kept = asyncio.create_task(said(base, Sampling(max_tokens=300)))
        async with aclosing(tuned.stream(asked("Long."), LONG)) as broken:
            await anext(broken)
            await until(lambda: base._host.batch.rows == 2)
            await tuned.close()
            with pytest.raises(EngineBroken, match="closed"):
                [chunk async for chunk in broken]
        assert not tuned.is_alive
        assert base.is_alive
        with pytest.raises(EngineBroken, match="closed"):
            await tuned.check()
        assert await kept == BASE_SYMBOL * 300
        assert not base._host._adapters._adapters

    serve(work, endless(), endless("a"))


def test_a_slot_swaps_while_an_answer_is_written() -> None:
    async def run() -> None:
        slot = ModelSlot(TransformersEngines(precision="fp32").build)
        await slot.start(tiny("v0"))
        async with slot.pin() as engine, aclosing(engine.stream(asked(QUESTIONS[1]), GREEDY)) as old:
            text = (await anext(old)).text
            assert await slot.swap(tiny("v1", 1)) == "v0"
            async with slot.pin() as new:
                assert isinstance(new, TransformersEngine)
                assert await said(new, GREEDY) == generated(1, QUESTIONS[0])
            text += "".join([chunk.text async for chunk in old])
        assert text == generated(None, QUESTIONS[1])
        await slot.close()

    asyncio.run(run())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter(1), tmp_path / "adapter"))


def change(adapter: Path, work: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    work(tensors)
    save_file(tensors, path)


def refusal(adapter: Path, kind: type[Exception]) -> str:
    """Why the adapter is refused, beside an engine that goes on."""
    sentence = ""

    async def work(engine: TransformersEngine) -> None:
        nonlocal sentence
        engines = TransformersEngines(precision="fp32")
        engines._hosts[engine._host] = 1
        with pytest.raises(kind) as caught:
            await engines.build(ServedVersion("v9", base_model=engine._host.name, adapter_directory=adapter))
        sentence = str(caught.value)
        assert list(engines._hosts.values()) == [1]
        assert await said(engine, GREEDY) == generated(None, QUESTIONS[0])

    serve(work)
    return sentence


def test_an_adapter_that_is_not_finite_is_refused(adapter: Path) -> None:
    change(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(torch.nan))
    assert "not finite" in refusal(adapter, EngineStartFailed)


def test_an_adapter_of_another_shape_or_place_is_refused(adapter: Path) -> None:
    def wider(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "lora_A" in key)
        tensors[key] = torch.zeros(tensors[key].shape[0], 99)

    change(adapter, wider)
    assert "is 99 → " in refusal(adapter, VersionUnservable)

    def deeper(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1.", "layers.31.")] = tensors.pop(key)

    shutil.copytree(tiny_adapter(1), adapter, dirs_exist_ok=True)
    change(adapter, deeper)
    assert "has no model.layers.31." in refusal(adapter, VersionUnservable)


def test_an_adapter_of_another_kind_or_damaged_is_refused(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert "use_dora" in refusal(adapter, VersionUnservable)
    shutil.copytree(tiny_adapter(1), adapter, dirs_exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    assert "damaged" in refusal(adapter, EngineStartFailed)
    shutil.rmtree(adapter)
    assert "cannot be read" in refusal(adapter, EngineStartFailed)


def test_rank_stabilised_and_patterned_adapters_have_pefts_numbers(adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from chat_app.serving.side_by_side import AdaptersSideBySide, read_adapter

    config = adapter / "adapter_config.json"
    own = {"use_rslora": True, "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 1}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    tokens = torch.arange(20, 40)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(shared_directory(), dtype=torch.float32) for _ in range(2))
    side_by_side = AdaptersSideBySide(ours)
    with torch.inference_mode():
        side_by_side.add("x", read_adapter(adapter, "v1", ours))
        side_by_side.add("y", read_adapter(tiny_adapter(10), "v2", ours))
        side_by_side.route(["y", None, "x"])
        mixed = ours(tokens.repeat(3, 1)).logits
        peft = PeftModel.from_pretrained(theirs, adapter, adapter_name="one")
        assert torch.allclose(mixed[2], peft(tokens).logits[0], atol=1e-4)
        with peft.disable_adapter():
            assert torch.allclose(mixed[1], peft(tokens).logits[0], atol=1e-4)


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_directory(), tmp_path / "base"))


def failure(base: Path | str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        ModelHost(str(base), precision="fp32")
    return str(caught.value)


def test_a_base_that_cannot_be_served_says_why(other_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no directory with a model" in failure(other_base.parent / "absent", EngineStartFailed)
    template = (other_base / "chat_template.jinja").rename(other_base / "elsewhere")
    assert "no chat template" in failure(other_base, VersionUnservable)
    template.rename(other_base / "chat_template.jinja")
    with monkeypatch.context() as small:
        small.setattr(base_loading, "free_bytes", lambda device: 10**6)
        assert "GB are free" in failure(other_base, NoRoom)
    weights = load_file(other_base / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, other_base / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight holds numbers that are not finite" in failure(other_base, EngineStartFailed)
    (other_base / "model.safetensors").write_bytes(b"no weights")
    assert "damaged" in failure(other_base, EngineStartFailed)


def test_a_template_that_refuses_is_the_callers_error() -> None:
    async def work(engine: TransformersEngine) -> None:
        engine._host._encoder.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(EngineRefused, match="roles must alternate"):
            await said(engine, GREEDY)

    serve(work)


def test_a_forward_that_fails_breaks_its_answers_and_the_next_ones_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(engine: TransformersEngine) -> None:
        async with aclosing(engine.stream(asked("Long."), LONG)) as stream:
            await anext(stream)
            with monkeypatch.context() as broken:
                broken.setattr(engine._host._model, "forward", fail)
                with pytest.raises(EngineBroken, match="the model failed while it wrote: no such kernel"):
                    [chunk async for chunk in stream]
        assert engine.is_alive
        assert await said(engine, GREEDY) == BASE_SYMBOL * 24

    serve(work, endless())


def test_a_model_that_fails_again_is_dead_and_the_slot_builds_it_again() -> None:
    async def run() -> None:
        slot = ModelSlot(TransformersEngines(precision="fp32").build)
        await slot.start(tiny())
        async with slot.pin() as engine:
            assert isinstance(engine, TransformersEngine)
            engine._host._model.forward = fail
            broken = await asyncio.gather(*(said(engine, GREEDY, text) for text in QUESTIONS), return_exceptions=True)
            assert all(isinstance(error, EngineBroken) for error in broken)
            await until(lambda: not engine.is_alive)
            with pytest.raises(EngineBroken, match="not running any more"):
                await said(engine, GREEDY)
        async with slot.pin() as reborn:
            assert isinstance(reborn, TransformersEngine)
            assert await said(reborn, GREEDY) == generated(None, QUESTIONS[0])
        await slot.close()

    asyncio.run(run())


def test_a_worker_that_dies_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: TransformersEngine) -> None:
        async with aclosing(engine.stream(asked("Long."), LONG)) as stream:
            await anext(stream)
            monkeypatch.setattr(engine._host.batch, "step", fail)
            with pytest.raises(EngineBroken, match=r"worker of .* stopped"):
                [chunk async for chunk in stream]
        assert not engine.is_alive

    serve(work, endless())


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no such kernel")
