"""The GGUF file that is served: the base's own, requantised once where another form answers faster.

The embedded model comes in Q4_1, which llama.cpp computes slowly on processors. Its weights dequantised (what versions
are trained and judged on) and quantised to Q8_0 are served instead: docs/benchmarks/quantisation.md has the speeds, and
how closely they agree. Called by `chat_app/__main__.py`; by hand: `python -m trainer.served_model GGUF OUT.gguf Q8_0`.

Needs gguf and numpy, no torch. Not covered: files a person named, which are served as they are.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from feedback_store.durable import new_directory, read_json, sha256_of, write_json
from trainer.base_model import BaseModel, base_directory, sha256_while_unchanged
from trainer.errors import BaseModelMissing

log = logging.getLogger(__name__)

FORM = "Q8_0"
FILE = "model.gguf"
MANIFEST = "manifest.json"


def ensure_served(base: BaseModel, models_dir: Path) -> Path:
    """The base's GGUF in the served form, made on first use (seconds) under the base's own hash.

    A file that is not the one its manifest describes is made again. Raises BaseModelMissing where there is no GGUF
    file to begin with, OSError where there is no room.
    """
    if base.gguf is None:
        raise BaseModelMissing(f"The base {base.name} has no GGUF file to serve.")
    target = base_directory(BaseModel(base.name, base.gguf), models_dir).with_suffix(f".{FORM.lower()}")
    gguf, manifest = target / FILE, read_json(target / MANIFEST)
    if manifest is not None and gguf.is_file() and sha256_while_unchanged(gguf) == manifest["sha256"]:
        return gguf
    if target.exists():
        log.warning("%s is not as it was written; making it again.", target)
        shutil.rmtree(target)
    log.info("Preparing %s as %s, once: %s", base.name, FORM, gguf)
    began = time.monotonic()
    with new_directory(target) as directory:
        requantise(base.gguf, directory / FILE, FORM)
        sha256 = sha256_of(directory / FILE)
        write_json(directory / MANIFEST, {"base": base.name, "from": base.gguf.name, "form": FORM, "sha256": sha256})
    log.info("%s is prepared after %.1f s.", base.name, time.monotonic() - began)
    return gguf


def requantise(source: Path, out: Path, form: str) -> None:
    """Write `source` with every matrix dequantised and quantised to `form`, a name llama.cpp has for it.

    Vectors stay as they are, and so do matrices that are in that form already; so does all metadata.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

    reader = GGUFReader(source)
    writer = GGUFWriter(out, str(metadata(reader, "general.architecture")))
    copy_metadata(reader, writer)
    file_types = {"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[file_types.get(form, f"MOSTLY_{form}")])
    wanted = GGMLQuantizationType[form]
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if len(tensor.shape) < 2 or kind == wanted:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=kind)
        else:
            weights = quants.quantize(quants.dequantize(tensor.data, kind), wanted)
            writer.add_tensor(tensor.name, weights, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_metadata(reader: Any, writer: Any) -> None:
    """Copy all keys of a GGUF file but those the writer sets itself."""
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[1] if kind == GGUFValueType.ARRAY else None)


def metadata(reader: Any, key: str) -> Any:
    """The value of a key of a GGUF file. Raises KeyError."""
    return reader.fields[key].contents()


if __name__ == "__main__":
    requantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
