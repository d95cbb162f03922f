"""The head of a GGUF file is read as the `gguf` package reads it, and nothing else is taken for one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import tiny_model
from gguf import GGUFReader

from chat_app.serving.gguf_metadata import read_metadata, special_tokens

KEYS = (
    "general.architecture",
    "general.license",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.chat_template",
)


@pytest.fixture(scope="module")
def tiny() -> Path:
    gguf = tiny_model.shared_tiny().gguf
    assert gguf is not None
    return gguf


def test_the_values_are_those_of_the_package(tiny: Path) -> None:
    fields = GGUFReader(tiny).fields
    assert read_metadata(tiny, KEYS) == {key: fields[key].contents() for key in KEYS}
    assert read_metadata(tiny, ["no.such.key"]) == {}


def test_control_tokens_are_found_by_their_type(tiny: Path) -> None:
    control, added = special_tokens(tiny)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"} <= set(control)
    assert len(control) == 17
    assert added == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is no model, but long enough for a header",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"key" + struct.pack("<I", 77),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 5) + struct.pack("<Q", 3) + b"ke",
    ],
)
def test_what_is_no_gguf_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"strange\.gguf is no GGUF file"):
        special_tokens(path)
