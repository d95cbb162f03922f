"""A tiny Llama that writes one letter for ever, and adapters that each make it another letter: versions one can see.

The base writes `SYMBOLS[0]`; `symbol_adapter(path, k)` makes it write `SYMBOLS[k]`. How it works: all matrices of the
one layer are zero, so the last token's embedding passes through; every embedding has a 1 in its first place, which the
output matrix reads as `SYMBOLS[0]`. An adapter on `ffn_down` adds to the k-th place instead, which the output matrix
reads more loudly. Tokenizer and chat template are the embedded model's, cut to single bytes. A few hundred KB.
"""

from __future__ import annotations

import string
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tiny_model
from gguf import GGUFReader, GGUFWriter
from safetensors.numpy import save_file

from feedback_store.durable import new_directory, sha256_of, write_json
from trainer.base_model import embedded
from trainer.versions import VersionManifest

SYMBOLS = string.ascii_uppercase + string.ascii_lowercase
HIDDEN, FEED_FORWARD, HEADS, CONTEXT = 64, 32, 4, 8192
QUESTION = "Which letter are you?"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
VOCABULARY = 17 + 256 + 15  # the special tokens, the single bytes, and a few merged ones

FILES = ("adapter.gguf", "adapter/adapter_model.safetensors", "evaluation.json")


def symbol_of(number: int) -> str:
    """What version `number` writes."""
    return SYMBOLS[number % len(SYMBOLS)]


def build_symbol_gguf(path: Path, chat_template: str | None = None) -> Path:
    """Write the base to `path`; with a `chat_template` of its own where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = embedded().gguf
    assert source is not None
    reader = GGUFReader(source)
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    embeddings = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    embeddings[:, 0] = 1.0
    output = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    for place, symbol in enumerate(SYMBOLS):
        output[tokens.index(symbol), place] = 4.0
    writer = GGUFWriter(path, "llama")
    writer.add_name("symbols")
    writer.add_type("model")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    tiny_model.copy_tokenizer(reader, writer, VOCABULARY, chat_template)
    gate = np.zeros((FEED_FORWARD, HIDDEN), dtype=np.float32)
    gate[:, 0] = 1.0  # what the adapters multiply: the same positive number for every token
    square, norm = np.zeros((HIDDEN, HIDDEN), dtype=np.float32), np.ones(HIDDEN, dtype=np.float32)
    tensors = {
        "token_embd.weight": embeddings,
        "output_norm.weight": norm,
        "output.weight": output,
        "blk.0.attn_norm.weight": norm,
        "blk.0.ffn_norm.weight": norm,
        "blk.0.ffn_gate.weight": gate,
        "blk.0.ffn_up.weight": gate,
        "blk.0.ffn_down.weight": np.zeros((HIDDEN, FEED_FORWARD), dtype=np.float32),
        **{f"blk.0.attn_{name}.weight": square for name in ("q", "k", "v", "output")},
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    _write(writer)
    return path


def symbol_adapter(path: Path, number: int, *, hidden: int = HIDDEN) -> Path:
    """An adapter that makes the base write `symbol_of(number)`; of a wrong shape with another `hidden`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = number % len(SYMBOLS)
    up = np.zeros((hidden, 1), dtype=np.float32)
    up[place % hidden, 0] = 1.0
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", np.ones((1, FEED_FORWARD), dtype=np.float32))
    writer.add_tensor("blk.0.ffn_down.weight.lora_b", up)
    _write(writer)
    return path


def publish_symbol_version(
    versions_dir: Path,
    number: int,
    base: str,
    *,
    canaries: bool = True,
    canary: int | None = None,
    prompt: str = PROMPT,
    hidden: int = HIDDEN,
) -> str:
    """Publish `v<number>` as the trainer would; with `canary`, another version's answer stands in its evaluation."""
    version = f"v{number}"
    begins = symbol_of(number if canary is None else canary) * 8
    recorded = [{"messages": [{"role": "user", "content": QUESTION}], "prompt": prompt, "begins": begins}]
    with new_directory(versions_dir / version) as directory:
        symbol_adapter(directory / "adapter.gguf", number, hidden=hidden)
        (directory / "adapter").mkdir()
        save_file({"lora_A": np.ones((1, 4), dtype=np.float32)}, directory / "adapter" / "adapter_model.safetensors")
        write_json(directory / "evaluation.json", {"canaries": recorded if canaries else []})
        files = {name: sha256_of(directory / name) for name in FILES}
        manifest = VersionManifest(
            version=version,
            base=base,
            base_sha256=None,
            snapshot="made-up",
            recipe="dpo-lora",
            recipe_values={},
            seed=0,
            run_id=f"run_20261122-231500_{number:04x}",
            practice=None,
            created_at="2026-11-22T23:15:00+00:00",
            evaluation={"champion": "v0", "wins": 1, "ties": 0, "losses": 0, "pairs": 1},
            verdict={"decision": "promote", "reasons": ["made up"]},
            files=files,
        )
        write_json(directory / "manifest.json", asdict(manifest))
    return version


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
