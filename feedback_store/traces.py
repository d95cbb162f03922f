"""What betrays a person in a file of the data directory, and how it is taken out.

    ids, names, texts → Traces → betrays(file) → blank_lines, mend_json, or the file goes

Looked for: the ids of the person and of their rows anywhere; four of their words in a row, short lines as a whole (12
characters at least), and single words with letters and digits or an @, where words of people may stand. In JSON these
are the fields of ``_WORDS`` and ``_SENTENCES``: what the machine writes for itself (states, versions, keys, recipes,
paths) is never touched, whatever a person is called and whatever they wrote.

A name is looked for in files from before there were ids: as a whole in the fields and columns where a person stands,
and in lines of logs and cards where it could be nothing else (``ann.doe``, ``ann@example.org``, ``Ann Doe``). Not
found: a name of one plain word in a sentence, a paraphrase, words in files that are compressed in another way than
gzip, or in the texts of a Parquet file (its columns of people and ids are read). Used by ``erasure.py``.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feedback_store.bounded import load_json
from feedback_store.durable import write_json
from feedback_store.people import ACTORS, is_person_id

MARK = "[erased]"
_GRAM_WORDS = 4
_SHORTEST_LINE = 12
_SHORTEST_TOKEN = 8
_MOST_GRAMS = 3_000_000
_ID_COLUMNS = ("preference_id", "unpaired_id", "pick_id")
# Scripts that write no blanks between words: each sign is a word.
_SIGNS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+")
_TOKEN = re.compile(rf"[\w@.+-]{{{_SHORTEST_TOKEN},}}")
_DOTTED = re.compile(r"\w[._]\w")
_SHORTEST_NAME = 5

# Fields of our JSON files: where a person stands, an actor (a person or a word of the program's own), what people
# wrote, and sentences that may quote it.
_PEOPLE = {"rater", "raters", "without"}
_CAUSING = {"by", "requested_by", "started_by", "changed_by", "ended_by", "dismissed_by", "promoted_by"}
_WORDS = {
    "prompt", "prompts", "content", "text", "texts", "chosen", "rejected", "completion", "question", "questions",
    "answer", "answers", "example", "examples", "turns", "title", "comment", "note", "notes", "why", "words", "quote",
    "excerpt", "explanation", "response", "output",
}  # fmt: skip
_SENTENCES = {"error", "reason", "reasons", "sentence", "problem", "message", "detail", "details", "warnings"}
# What is compared with or started from later; the questions of the canaries are the program's own.
_HOUSE = {"canaries", "recipe", "launch", "base", "snapshot", "role", "schedule", "decisions", "verdict"}
_SENTENCE_WORDS = 7
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[nrt\"'/\\])")


class Traces:
    """A person's id and names, the ids of their rows and their texts, ready to be looked for."""

    def __init__(self, rater: str, ids: Collection[str], texts: Iterable[str], *, names: Collection[str] = ()) -> None:
        self.names = frozenset((rater, *names))
        self.ids = pa.array(list(ids), pa.string())
        self._actors = self.names - ACTORS
        telling = sorted(filter(_is_telling_name, (name.strip().casefold() for name in self.names)))
        self._name = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, telling))})(?![^\W_])") if telling else None
        self._plain_ids = frozenset(one.casefold() for one in (*ids, *filter(is_person_id, self.names)))
        self._grams: dict[int, set[int]] = {}
        self._tokens: set[str] = set()
        self._is_too_much = False
        for text in texts:
            for line in _plain(text).splitlines():
                self._learn(line)

    def in_text(self, text: str) -> bool:
        """Whether a line of a log, or a sentence somebody wrote, holds the name, an id or words of the person."""
        return (self._name is not None and self._name.search(_plain(text)) is not None) or self.in_words(text)

    def in_words(self, text: str) -> bool:
        """The same without the name: ids and words."""
        plain = _plain(text)
        words = _WORD.findall(plain)
        return (
            self._in_words(words)
            or not self._tokens.isdisjoint(map(_bare, _TOKEN.findall(plain)))
            or (self._is_too_much and len(words) >= _GRAM_WORDS)
        )

    def in_value(self, text: str) -> bool:
        """The same for a value of a record. One without a blank is a word of ours, unless all of it is theirs."""
        plain = _plain(text).strip()
        if any(map(str.isspace, plain)):
            return self.in_words(text)
        return self._in_words(_WORD.findall(plain))

    def has_id(self, text: str) -> bool:
        """Whether a value names the person or one of their rows by id."""
        return not self._plain_ids.isdisjoint(_WORD.findall(text.casefold()))

    def is_them(self, text: str, *, actor: bool) -> bool:
        """Whether the value of a field where a person stands is this one; ``actor``: a word of ours may stand there."""
        return text in (self._actors if actor else self.names)

    def _in_words(self, words: list[str]) -> bool:
        if not self._plain_ids.isdisjoint(words):
            return True
        return any(
            hash(tuple(words[start : start + length])) in grams
            for length, grams in self._grams.items()
            for start in range(len(words) - length + 1)
        )

    def _learn(self, line: str) -> None:
        """Keep every fourth group of four words, and the last one: seven words in a row always hold one."""
        self._tokens.update(token for token in map(_bare, _TOKEN.findall(line)) if _is_telling(token))
        words = _WORD.findall(line)
        length = min(len(words), _GRAM_WORDS)
        if length < _GRAM_WORDS and sum(map(len, words)) < _SHORTEST_LINE:
            return
        grams = self._grams.setdefault(length, set())
        if len(grams) > _MOST_GRAMS:
            # Too much for memory: from here on every sentence counts as theirs.
            self._is_too_much = True
            return
        for start in {*range(0, len(words) - length + 1, _GRAM_WORDS), len(words) - length}:
            grams.add(hash(tuple(words[start : start + length])))


def betrays(path: Path, traces: Traces) -> bool:
    """Whether a file holds a trace; one that cannot be looked through counts as if it did."""
    if path.suffix == ".parquet":
        return parquet_holds(path, traces, unreadable=True)
    if path.suffix == ".json" and (value := _json(path)) is not None:
        return bool(_mended(value, traces) != value)
    are_json = path.suffix == ".jsonl"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return any(_line_betrays(line.decode("utf-8", "replace"), traces, are_json=are_json) for line in file)
    except (gzip.BadGzipFile, EOFError):
        return True


def parquet_holds(path: Path, traces: Traces, *, unreadable: bool) -> bool:
    """Whether a Parquet file has a row of the person; ``unreadable`` is the answer where that cannot be told."""
    try:
        names = pq.read_schema(path).names
        columns = [name for name in ("rater", *_ID_COLUMNS) if name in names]
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException):
        return unreadable
    wanted = dict.fromkeys(_ID_COLUMNS, traces.ids) | {"rater": pa.array(sorted(traces.names), pa.string())}
    return any(pc.any(pc.is_in(table[name], value_set=wanted[name])).as_py() for name in columns)


def blank_lines(path: Path, traces: Traces) -> bool:
    """Overwrite each line that holds a trace with blanks, of JSON one with a field that does; whether there was one.

    The file keeps its length and its place on the disk, so that whoever writes on at its end is not disturbed.
    """
    touched = False
    with path.open("rb+") as file:
        start = 0
        for line in iter(file.readline, b""):
            if _line_betrays(line.decode("utf-8", "replace"), traces, are_json=path.suffix == ".jsonl"):
                file.seek(start)
                file.write(b" " * len(line.rstrip(b"\r\n")))
                file.seek(start + len(line))
                touched = True
            start += len(line)
        file.flush()
        os.fsync(file.fileno())
    return touched


def mend_json(path: Path, traces: Traces) -> bool:
    """Put a mark in the place of every value in a JSON file that holds a trace; whether there was one."""
    value = _json(path)
    if value is None:
        return blank_lines(path, traces)
    mended = _mended(value, traces)
    if mended == value:
        return False
    write_json(path, mended)
    return True


def mended_text(text: str, traces: Traces) -> str:
    """A text without traces: of a JSON object field by field, other text as a whole."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return MARK if traces.in_text(text) else text
    mended = _mended(value, traces)
    return text if mended == value else json.dumps(mended, ensure_ascii=False)


def _json(path: Path) -> Any:
    """What a JSON file holds; None for nothing, and where that cannot be told."""
    try:
        return load_json(path)
    except ValueError:
        return None


def _line_betrays(line: str, traces: Traces, *, are_json: bool) -> bool:
    if are_json:
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            return bool(_mended(value, traces) != value)
    return traces.in_text(line)


def _mended(value: Any, traces: Traces, field: str = "") -> Any:
    """The value of a field of JSON with a mark in the place of what is the person's."""
    if isinstance(value, str):
        return MARK if _is_theirs(value, traces, field) else value
    if isinstance(value, list):
        return [_mended(one, traces, field) for one in value]
    if isinstance(value, dict):
        return {
            MARK if traces.has_id(name) else name: _mended(one, traces, _inner(field, name))
            for name, one in value.items()
        }
    return value


def _inner(outer: str, name: str) -> str:
    """The field a value is of: what stands below people's words is words, below what is the house's nothing is."""
    if outer in _HOUSE or name in _HOUSE:
        return name if name in _HOUSE else outer
    return outer if outer in _WORDS and name not in _PEOPLE else name


def _is_theirs(value: str, traces: Traces, field: str) -> bool:
    if traces.has_id(value):
        return True
    if field in _PEOPLE or field in _CAUSING:
        return traces.is_them(value, actor=field in _CAUSING)
    if field in _HOUSE:
        return False
    if field in _WORDS:
        return traces.in_value(value)
    # A field that nobody thought of may hold a sentence; a path, a command or a time is none.
    is_prose = len([word for word in _WORD.findall(value) if word.isalpha()]) >= _SENTENCE_WORDS and value[:1] != "/"
    return (is_prose or (field in _SENTENCES and " " in value.strip())) and traces.in_words(value)


def _plain(text: str) -> str:
    """Without the escapes of JSON, Python and HTML, and without upper case."""
    if "\\" in text:
        text = _ESCAPE.sub(lambda found: chr(int(found[1] or found[2] or "20", 16)), text)
    return (html.unescape(text) if "&" in text else text).casefold()


def _bare(token: str) -> str:
    return token.strip(".+-")


def _is_telling_name(name: str) -> bool:
    """Whether a name in a line of a log is no word of the program's: not "finished", not "v0", not "{".

    It is one with an @ or a dot in it, of letters and digits, or of two words.
    """
    words = name.split()
    if len(name) < _SHORTEST_NAME or not all(any(map(str.isalpha, word)) for word in words):
        return False
    return len(words) > 1 or "@" in name or _is_telling(name) or _DOTTED.search(name) is not None


def _is_telling(token: str) -> bool:
    """An address, a key, a number with letters: long, and not a word."""
    has_letters = any(map(str.isalpha, token))
    has_digits = any(map(str.isdigit, token))
    return len(token) >= _SHORTEST_TOKEN and ("@" in token or (has_letters and has_digits))
