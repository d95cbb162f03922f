"""Is there room: the machine's memory or the control group's, and the cache of a model read from its file."""

from pathlib import Path

import psutil
import tiny_model

from chat_app.serving.memory import available_bytes, cache_bytes, total_bytes

MIB = 2**20


def control_group(path: Path, limit: str, used: int, droppable: int) -> Path:
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\nactive_file {droppable - 1}\ninactive_file 1\nslab 7\n")
    return path


def test_the_tighter_limit_counts(tmp_path: Path) -> None:
    assert available_bytes(control_group(tmp_path, str(500 * MIB), 400 * MIB, 30 * MIB)) == 130 * MIB
    assert available_bytes(control_group(tmp_path, str(500 * MIB), 600 * MIB, 30 * MIB)) == 0


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    for group in (tmp_path, control_group(tmp_path, "max", 1, 1)):
        assert 0 < available_bytes(group) <= psutil.virtual_memory().total


def test_what_there_is_ends_at_the_limit_too(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    assert total_bytes(tmp_path) == total_bytes(control_group(tmp_path, "max", 1, 1)) == machine
    assert total_bytes(control_group(tmp_path, str(500 * MIB), 400 * MIB, 1)) == 500 * MIB
    assert total_bytes(control_group(tmp_path, str(10**18), 1, 1)) == machine


def test_the_cache_follows_from_the_model(tmp_path: Path) -> None:
    model = tiny_model.shared_tiny().gguf
    assert model is not None
    each = tiny_model.LAYERS * tiny_model.KV_HEADS * (tiny_model.HIDDEN // tiny_model.HEADS) * 2 * 2
    assert cache_bytes(model, 1000) == 1000 * each


def test_a_file_that_is_no_model_has_no_cache(tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    for content in (b"", b"this is no model", b"this is no model at all, and long", b"GGUF" + b"\xff" * 60):
        junk.write_bytes(content)
        assert cache_bytes(junk, 1000) == 0
