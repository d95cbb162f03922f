"""A tiny Llama made on the spot, as one GGUF file: the same path as the embedded model, in seconds.

Two layers, hidden size 64, four heads, two key-value heads, random seeded F32 weights; tokenizer and chat template
are copied from the embedded model's file, so llama-server serves it and `ensure_base` converts it. It says nothing
sensible, but never the same token over and over, and an adapter changes what it says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from trainer.base_model import BaseModel, embedded
from trainer.gguf_adapter import permute_rows

LAYERS, HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 2, 64, 4, 2, 128
VOCABULARY, CONTEXT, ROPE_BASE, EPSILON = 4096, 2048, 10000.0, 1e-5
END_OF_ANSWER = 2  # <|im_end|>
COMMON, END = 0.35, 1.15  # how far each token, and the end token, leans in one common direction: ends an answer


def build_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Write the model to `path` (about 13 MB) and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = embedded().gguf
    assert source is not None
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_type("model")
    writer.add_string("general.license", "apache-2.0")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    _copy_tokenizer(GGUFReader(source), writer)
    for name, tensor in _weights(np.random.default_rng(seed)).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_base(path: Path, seed: int = 0) -> BaseModel:
    """A BaseModel on a fresh tiny GGUF at `path`."""
    return BaseModel("tiny", build_tiny_gguf(path, seed))


def _copy_tokenizer(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copy all `tokenizer.*` metadata with the first `VOCABULARY` tokens and the merges that make them.

    Tokens of a byte-level BPE stand in the order of their merges, so a shorter list is a tokenizer too.
    """
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    cut = {
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": VOCABULARY,
        "tokenizer.ggml.merges": VOCABULARY - (len(tokens) - len(merges)),
    }
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            value, kind = field.contents(), field.types[0]
            inner = field.types[1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key, value[: cut[key]] if key in cut else value, kind, inner)


def _weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    head = HIDDEN // HEADS

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)

    embeddings = rng.standard_normal((VOCABULARY, HIDDEN)) * 0.5
    embeddings += COMMON
    embeddings[END_OF_ANSWER] += END
    tensors = {
        "token_embd.weight": embeddings,
        "output_norm.weight": np.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensors |= {
            f"{block}.attn_norm.weight": np.ones(HIDDEN),
            f"{block}.ffn_norm.weight": np.ones(HIDDEN),
            f"{block}.attn_q.weight": permute_rows(matrix(HIDDEN, HIDDEN, 2.0), HEADS),
            f"{block}.attn_k.weight": permute_rows(matrix(KV_HEADS * head, HIDDEN, 2.0), KV_HEADS),
            f"{block}.attn_v.weight": matrix(KV_HEADS * head, HIDDEN, 2.0),
            f"{block}.attn_output.weight": matrix(HIDDEN, HIDDEN, 2.0),
            f"{block}.ffn_gate.weight": matrix(FEED_FORWARD, HIDDEN, 2.0),
            f"{block}.ffn_up.weight": matrix(FEED_FORWARD, HIDDEN, 2.0),
            f"{block}.ffn_down.weight": matrix(HIDDEN, FEED_FORWARD, 2.0),
        }
    return tensors
