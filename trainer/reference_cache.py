"""The reference's log-probabilities of each pair, computed once and kept for ever.

They depend on the base's weights, the precision and the token ids, on nothing else: not on the snapshot, the recipe or
the order. So a pair that was ever learned from is never scored by the reference again, and 500 new pairs on top of
10,000 cost 500. (TRL's own cache is keyed by the whole data set: one new pair throws it away.)

    <models>/reference_logps/<base + tokenizer + precision>/<time>-<process>.jsonl      a line a pair

Every process appends to a file of its own and reads all of them, so nothing is locked; a line carries a checksum, so
the half line of a killed process counts as not written. Where two files hold a pair, the first one written counts.
Deleting the directory costs time, nothing else. Importing this imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from feedback_store.durable import sha256_of, sync
from trainer.tokens import PairTokens

REFERENCES = "reference_logps"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges*")


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probability of each answer behind the prompt, summed over its tokens, in nats."""

    chosen: float
    rejected: float


class ReferenceCache:
    """What is known of one reference, in `<root>/<fingerprint>`."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.directory = root / fingerprint
        name = f"{time.time_ns():020d}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._own = self.directory / name

    def load(self) -> dict[str, PairLogps]:
        """All pairs there are, by `pair_key`."""
        found: dict[str, PairLogps] = {}
        for path in sorted(self.directory.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                entry = _read(line)
                if entry is not None:
                    found.setdefault(*entry)
        return found

    def append(self, entries: Mapping[str, PairLogps]) -> None:
        """Add pairs; they are on the disk when this returns."""
        if not entries:
            return
        is_new = not self._own.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._own.open("ab") as file:
            file.write(b"".join(_line(key, logps) for key, logps in entries.items()))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.directory)


def pair_key(tokens: PairTokens) -> str:
    """The content hash of a pair: where prompt and answers part counts, not only the ids."""
    digest = hashlib.sha256()
    for ids in (tokens.prompt, tokens.chosen, tokens.rejected):
        digest.update(f"{len(ids)}:{','.join(map(str, ids))};".encode())
    return digest.hexdigest()


def fingerprint(base_dir: Path, precision: str) -> str:
    """The hash of all that a reference depends on beside token ids. `precision` in words, such as `fp32 cpu`.

    Reads every weight: about a second for each gigabyte.
    """
    parts = [f"precision {precision}", _hash("configuration", base_dir, ("config.json",))]
    parts += [_hash("weights", base_dir, _WEIGHTS), _hash("tokenizer", base_dir, _TOKENIZER)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _hash(what: str, directory: Path, patterns: Iterable[str]) -> str:
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    return f"{what} " + " ".join(f"{path.name} {sha256_of(path)}" for path in paths)


def _line(key: str, logps: PairLogps) -> bytes:
    content = json.dumps([key, logps.chosen, logps.rejected])
    return f"{zlib.crc32(content.encode()):08x} {content}\n".encode()


def _read(line: bytes) -> tuple[str, PairLogps] | None:
    checksum, _, content = line.partition(b" ")
    if not content or checksum != f"{zlib.crc32(content):08x}".encode():
        return None
    key, chosen, rejected = json.loads(content)
    return key, PairLogps(chosen, rejected)
