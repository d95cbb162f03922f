"""What the reference said is there again, whatever was killed and whoever else wrote."""

import multiprocessing
import shutil
from pathlib import Path

import tiny_model

from trainer.reference_cache import PairLogps, ReferenceCache, fingerprint, pair_key
from trainer.tokens import PairTokens


def entries(start: int, count: int, shift: float = 0.0) -> dict[str, PairLogps]:
    numbers = range(start, start + count)
    return {pair_key(PairTokens([n], [n + 1], [n + 2])): PairLogps(-n / 7 + shift, -n / 3) for n in numbers}


def test_pairs_come_back_to_the_last_bit(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "base")
    assert cache.load() == {}
    cache.append(entries(0, 5))
    cache.append({})
    cache.append(entries(5, 5))
    assert ReferenceCache(tmp_path, "base").load() == entries(0, 10)
    assert ReferenceCache(tmp_path, "another base").load() == {}


def test_a_write_that_was_killed_loses_its_half_line_and_nothing_else(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "base")
    cache.append(entries(0, 3))
    path = next(cache.directory.iterdir())
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = cache.load()
        # The last line counts once its checksum and content are there, with or without the end of line.
        assert found == entries(0, whole[: cut + 1].count(b"\n"))
    path.write_bytes(whole.replace(b"0.14", b"0.15"))
    assert len(cache.load()) == 2


def test_a_new_process_does_not_write_behind_a_half_line(tmp_path: Path) -> None:
    first = ReferenceCache(tmp_path, "base")
    first.append(entries(0, 2))
    path = next(first.directory.iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    ReferenceCache(tmp_path, "base").append(entries(2, 2))
    assert ReferenceCache(tmp_path, "base").load() == {**entries(0, 1), **entries(2, 2)}


def test_what_was_written_first_counts(tmp_path: Path) -> None:
    ReferenceCache(tmp_path, "base").append(entries(0, 3))
    ReferenceCache(tmp_path, "base").append(entries(1, 3, shift=1e-9))
    assert ReferenceCache(tmp_path, "base").load() == {**entries(1, 3, shift=1e-9), **entries(0, 3)}


def _write(root: Path, start: int) -> None:
    cache = ReferenceCache(root, "base")
    for number in range(start, start + 50, 2):
        cache.append(entries(number, 2))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_write, args=(tmp_path, start)) for start in (0, 50)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    assert ReferenceCache(tmp_path, "base").load() == entries(0, 100)


def test_the_fingerprint_is_of_weights_tokenizer_and_precision(tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model.shared_directory(), tmp_path / "base")
    found = {fingerprint(base, "fp32 cpu"), fingerprint(base, "bf16 cpu")}
    assert fingerprint(shutil.copytree(base, tmp_path / "moved"), "fp32 cpu") in found
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"):
        before = (base / name).read_bytes()
        (base / name).write_bytes(before + b" ")
        found.add(fingerprint(base, "fp32 cpu"))
        (base / name).write_bytes(before)
    assert len(found) == 6
