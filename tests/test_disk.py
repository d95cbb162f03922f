"""Room on the disk: asked for with what the run really writes, and a full disk told from other errors."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_model

from trainer.base_model import BaseModel, embedded
from trainer.disk import FULL, SLACK, bytes_needed, check_disk, disk_full, full_disk, is_disk_full
from trainer.errors import NotEnoughDisk
from trainer.recipe import load_recipe

RECIPE = load_recipe("dpo-lora")
Usage = namedtuple("Usage", "total used free")


def test_parameters_are_counted_alike_in_gguf_and_safetensors(tmp_path: Path) -> None:
    tiny = tiny_model.shared_tiny()
    assert tiny.gguf is not None
    directory = tiny_model.shared_directory()
    fresh = bytes_needed(tiny, tmp_path, RECIPE)
    made = bytes_needed(BaseModel("tiny", directory=directory), tmp_path, RECIPE)
    conversion = (directory / "model.safetensors").stat().st_size
    assert fresh - made == pytest.approx(conversion, rel=0.02)
    assert made > SLACK


def test_a_larger_adapter_needs_more(tmp_path: Path) -> None:
    needed = bytes_needed(embedded(), tmp_path, RECIPE)
    # 4.9 million parameters of rank 16: weights and two moments, three checkpoints; four files; the base in fp32.
    assert needed - SLACK == pytest.approx(4 * (13 * 4_884_480 + 134_515_008), rel=0.01)


def test_a_model_that_is_not_here_yet_cannot_be_counted(tmp_path: Path) -> None:
    assert bytes_needed(BaseModel("far", hub_id="some/model"), tmp_path, RECIPE) == SLACK


def test_too_little_room_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_disk(tmp_path, tiny_model.shared_tiny(), RECIPE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2**40, 0, 10 * 2**20))
    with pytest.raises(NotEnoughDisk, match=r"needs about 6\d MiB .* 10 MiB are free below .* Free 5\d MiB"):
        check_disk(tmp_path, BaseModel("tiny", directory=tiny_model.shared_directory()), RECIPE)


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (
            RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/1"),
            True,
        ),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_full_disk_is_told_in_many_ways(error: Exception, is_full: bool) -> None:
    assert is_disk_full(error) == is_full


def test_a_full_disk_is_said_and_what_was_half_saved_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "checkpoints" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "optimizer.pt").write_bytes(b"half")
    assert "full after step 3:" in str(disk_full(tmp_path, 3))
    assert not half.exists()
    assert full_disk(tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2**40, 2**40, FULL - 1))
    assert "the disk is full, 2 MiB are free" in str(full_disk(tmp_path))
