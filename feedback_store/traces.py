"""What betrays a person in a file of the data directory, and how it is taken out.

    name, ids, texts → Traces → betrays(file) → blank_lines, mend_json, or the file goes

Looked for: the name, the ids of their rows, four of their words in a row, short lines as a whole (12 characters at
least), and single words with letters and digits or an @. Not found: a name within a longer word, a paraphrase, words
in files that are compressed in another way than gzip, or in the texts of a Parquet file (its columns of names and ids
are read). Used by ``erasure.py``.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feedback_store.bounded import load_json
from feedback_store.durable import write_json

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
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[nrt\"'/\\])")


class Traces:
    """A person's name, the ids of their rows and their texts, ready to be looked for."""

    def __init__(self, rater: str, ids: Collection[str], texts: Iterable[str]) -> None:
        self.rater = rater
        self.ids = pa.array(list(ids), pa.string())
        self._plain_name = rater.strip().casefold()
        self._name = re.compile(rf"(?<![^\W_]){re.escape(self._plain_name)}(?![^\W_])")
        self._plain_ids = frozenset(one.casefold() for one in ids)
        self._grams: dict[int, set[int]] = {}
        self._tokens: set[str] = set()
        self._is_too_much = False
        for text in texts:
            for line in _plain(text).splitlines():
                self._learn(line)

    def in_text(self, text: str) -> bool:
        """Whether a line of a log, or a sentence, holds the name, an id or words of the person."""
        plain = _plain(text)
        words = _WORD.findall(plain)
        return (
            self._in_words(words)
            or self._name.search(plain) is not None
            or not self._tokens.isdisjoint(map(_bare, _TOKEN.findall(plain)))
            or (self._is_too_much and len(words) >= _GRAM_WORDS)
        )

    def in_value(self, text: str) -> bool:
        """The same for a value of a record. One without a blank is a word of ours, unless all of it is theirs."""
        plain = _plain(text).strip()
        if any(map(str.isspace, plain)):
            return self.in_text(text)
        return plain == self._plain_name or self._in_words(_WORD.findall(plain))

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
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return any(traces.in_text(line.decode("utf-8", "replace")) for line in file)
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
    wanted = dict.fromkeys(_ID_COLUMNS, traces.ids) | {"rater": pa.array([traces.rater], pa.string())}
    return any(pc.any(pc.is_in(table[name], value_set=wanted[name])).as_py() for name in columns)


def blank_lines(path: Path, traces: Traces) -> bool:
    """Overwrite each line that holds a trace with blanks; whether there was one.

    The file keeps its length and its place on the disk, so that whoever writes on at its end is not disturbed.
    """
    touched = False
    with path.open("rb+") as file:
        start = 0
        for line in iter(file.readline, b""):
            if traces.in_text(line.decode("utf-8", "replace")):
                file.seek(start)
                file.write(b" " * len(line.rstrip(b"\r\n")))
                file.seek(start + len(line))
                touched = True
            start += len(line)
        file.flush()
        os.fsync(file.fileno())
    return touched


def mend_json(path: Path, traces: Traces) -> bool:
    """Put a mark in the place of every text in a JSON file that holds a trace; whether there was one."""
    try:
        value = load_json(path)
    except ValueError:
        return blank_lines(path, traces)
    mended = _mended(value, traces)
    if mended == value:
        return False
    write_json(path, mended)
    return True


def mended_text(text: str, traces: Traces) -> str:
    """A text without traces: JSON value by value, other text as a whole."""
    try:
        value = json.loads(text)
    except ValueError:
        return MARK if traces.in_text(text) else text
    mended = _mended(value, traces)
    return text if mended == value else json.dumps(mended, ensure_ascii=False)


def _mended(value: Any, traces: Traces) -> Any:
    if isinstance(value, str):
        return MARK if traces.in_value(value) else value
    if isinstance(value, list):
        return [_mended(one, traces) for one in value]
    if isinstance(value, dict):
        return {_mended(name, traces): _mended(one, traces) for name, one in value.items()}
    return value


def _plain(text: str) -> str:
    """Without the escapes of JSON, Python and HTML, and without upper case."""
    if "\\" in text:
        text = _ESCAPE.sub(lambda found: chr(int(found[1] or found[2] or "20", 16)), text)
    return (html.unescape(text) if "&" in text else text).casefold()


def _bare(token: str) -> str:
    return token.strip(".+-")


def _is_telling(token: str) -> bool:
    """An address, a key, a number with letters: long, and not a word."""
    has_letters = any(map(str.isalpha, token))
    has_digits = any(map(str.isdigit, token))
    return len(token) >= _SHORTEST_TOKEN and ("@" in token or (has_letters and has_digits))
