"""Presets: read from a file that is checked, chosen per conversation, applied to answers, pairs and what trains."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from server import Server, serving
from test_operations import house, last, served

from chat_app.operations import Operations, Refused
from chat_app.presets import Preset, load_presets
from chat_app.settings import SettingsError
from feedback_store.errors import NotFound
from feedback_store.records import Message, PickChoice

PRESETS = """
Short:
  system_prompt: Answer in one sentence.
  temperature: 0.2
  max_tokens: 3
Wild:
  temperature: 1.5
"""


def written(data_dir: Path, text: str = PRESETS) -> Path:
    path = data_dir / "presets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    assert load_presets(tmp_path / "presets.yaml") == {}
    assert load_presets(written(tmp_path, "")) == {}


def test_presets_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert list(load_presets(written(tmp_path)).items()) == [
        ("Short", Preset(system_prompt="Answer in one sentence.", temperature=0.2, max_tokens=3)),
        ("Wild", Preset(temperature=1.5)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Short:\n  temprature: 1", r"Short\.temprature is unknown\. A preset has: system_prompt, temperature, max_"),
        ("Short:\n  temperature: 9", r"Short\.temperature is '9'.*less than or equal to 2"),
        ("Short:\n  max_tokens: 0", r"Short\.max_tokens is '0'"),
        ("Short:\n  system_prompt: ''", r"Short\.system_prompt is ''"),
        ("Short: brief", "Short is 'brief', it must be keys with values"),
        ("- Short", "the file is .*it must be keys"),
        ("Short: [", "is no YAML"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"presets.yaml.*{said}"):
        load_presets(written(tmp_path, text))
    with pytest.raises(SettingsError, match=said), house(tmp_path):
        pass


async def whole(operations: Operations, text: str, preset: str | None = None) -> Any:
    """Say it in a new conversation and wait for the answer; the turn."""
    turn = operations.begin_turn(None, text, preset)
    async with aclosing(operations.reply(turn)) as growing:
        async for _ in growing:
            pass
    return turn


def test_a_conversation_keeps_its_preset_and_its_pairs_are_trained_with_it(tmp_path: Path) -> None:
    written(tmp_path)
    with house(tmp_path, system_prompt="Be kind.", max_tokens=900) as (operations, store):

        async def talk() -> Any:
            first = await whole(operations, "Hello", preset="Short")
            second = operations.begin_turn(first.conversation_id, "And then?")
            operations.choose_preset(first.conversation_id, "Wild")
            pair = (await last(operations.compare(second))).pair
            plain = await whole(operations, "Another one")
            return first, pair, plain

        first, pair, plain = served(operations, talk)
        assert operations.preset_of(first.conversation_id) == "Wild"
        assert operations.preset_of(plain.conversation_id) is None
        answer, *_ = (turn.answer for turn in operations.turns(first.conversation_id))
        assert answer is not None
        assert (answer.sampling["temperature"], answer.sampling["max_tokens"]) == (0.2, 3)
        assert answer.finish_reason == "length"
        assert (pair.first.sampling["temperature"], pair.first.sampling["max_tokens"]) == (1.5, 900)
        assert pair.prompt[0] == Message(role="system", content="Be kind.")  # a preset without a prompt of its own
        operations.record_pick(pair.pair_id, PickChoice.FIRST)
        (preference,) = store.preferences()
        assert preference.prompt == pair.prompt
        prompts = store.query("SELECT prompt[1].content FROM generations ORDER BY event", limit_s=5).rows
        assert [row[0] for row in prompts] == ["Answer in one sentence.", "Be kind.", "Be kind.", "Be kind."]
    with house(tmp_path) as (operations, _):
        assert operations.preset_of(first.conversation_id) == "Wild"
        operations.choose_preset(first.conversation_id, None)
        assert operations.preset_of(first.conversation_id) is None
        with pytest.raises(NotFound):
            operations.choose_preset("conv_none", "Wild")
        with pytest.raises(Refused, match=r"no preset 'Wide'\. There are: Short, Wild"):
            operations.begin_turn(None, "Hello", "Wide")
        assert len(operations.conversations()) == 2
    written(tmp_path, "Wild: {}")
    with house(tmp_path) as (operations, store):
        store.record_preset(first.conversation_id, "Short")
        assert operations.preset_of(first.conversation_id) is None  # it is gone: as if none were chosen
        asyncio.run(operations.close())


def test_a_system_message_of_the_client_wins(tmp_path: Path) -> None:
    written(tmp_path)
    with house(tmp_path, system_prompt="Be kind.") as (operations, _):
        asked, own = Message(role="user", content="Hello"), Message(role="system", content="Be a pirate.")
        assert operations.asked([asked]) == [Message(role="system", content="Be kind."), asked]
        assert operations.asked([asked], "Short")[0]["content"] == "Answer in one sentence."
        assert operations.asked([own, asked], "Short") == [own, asked]
    with house(tmp_path) as (operations, _):
        assert operations.asked([asked]) == [asked]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("presets")
    written(data_dir)
    with serving(data_dir, engine="scripted", system_prompt="Be kind.") as running:
        yield running


def test_the_api_lists_and_takes_presets(server: Server) -> None:
    assert server.get("/v1/presets") == {
        "presets": [
            {"name": "Short", "system_prompt": "Answer in one sentence.", "temperature": 0.2, "max_tokens": 3},
            {"name": "Wild", "system_prompt": None, "temperature": 1.5, "max_tokens": None},
        ],
        "system_prompt": "Be kind.",
    }
    assert server.chat("Hello", preset="Short")["choices"][0]["finish_reason"] == "length"
    assert server.chat("Hello", preset="Short", max_tokens=500)["choices"][0]["finish_reason"] == "stop"
    assert server.pair("Hello", preset="Short")["candidates"][0]["finish_reason"] == "length"
    question = {"messages": [{"role": "user", "content": "Hello"}], "preset": "None such"}
    for path in ("/v1/chat/completions", "/v1/pairs"):
        status, body = server.refused(path, question)
        assert (status, "There are: Short, Wild" in body["error"]["message"]) == (404, True)
