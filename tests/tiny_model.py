"""A tiny Llama made on the spot, as one GGUF file: the same path as the embedded model, in seconds.

Two layers, hidden size 64, four heads, two key-value heads, random seeded F32 weights; tokenizer and chat template
are copied from the embedded model's file, so llama-server serves it and `ensure_base` converts it. It says nothing
sensible, but never the same token over and over, and an adapter changes what it says.
"""

from __future__ import annotations

import atexit
import json
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from feedback_store.records import Message, Preference
from trainer.base_model import BaseModel, embedded, ensure_base
from trainer.gguf_adapter import permute_rows

LAYERS, HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 2, 64, 4, 2, 128
VOCABULARY, CONTEXT, ROPE_BASE, EPSILON = 4096, 2048, 10000.0, 1e-5
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
FIRST_MERGED_TOKEN = 17 + 256  # after the special tokens and the single bytes
END_OF_ANSWER = 2  # <|im_end|>
COMMON, END = 0.35, 1.15  # how far each token, and the end token, leans in one common direction: ends an answer


def build_tiny_gguf(path: Path, seed: int = 0, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Write the model to `path` (about 13 MB) and return it. `weights` None: random ones."""
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
    copy_tokenizer(GGUFReader(source), writer, VOCABULARY)
    for name, tensor in (weights or random_weights(seed)).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_base(path: Path, seed: int = 0) -> BaseModel:
    """A BaseModel on a fresh tiny GGUF at `path`."""
    return BaseModel("tiny", build_tiny_gguf(path, seed))


def copy_tokenizer(reader: GGUFReader, writer: GGUFWriter, vocabulary: int, chat_template: str | None = None) -> None:
    """Copy all `tokenizer.*` metadata with the first `vocabulary` tokens and the merges that make them.

    Tokens of a byte-level BPE stand in the order of their merges, so a shorter list is a tokenizer too.
    """
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    cut = {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": vocabulary,
        "tokenizer.ggml.merges": vocabulary - (len(tokens) - len(merges)),
    }
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            value, kind = field.contents(), field.types[0]
            inner = field.types[1] if kind == GGUFValueType.ARRAY else None
            if key == "tokenizer.chat_template" and chat_template is not None:
                value = chat_template
            writer.add_key_value(key, value[: cut[key]] if key in cut else value, kind, inner)


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """The weights under their GGUF names."""
    rng, head = np.random.default_rng(seed), HIDDEN // HEADS

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


@lru_cache(maxsize=1)
def shared_tiny() -> BaseModel:
    """One tiny base for the whole test session."""
    return tiny_base(session_directory() / "tiny.gguf")


def lend_models(data_dir: Path) -> None:
    """Give a data directory the session's converted base, so that each run does not convert it again."""
    models = session_directory() / "models"
    models.mkdir(exist_ok=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / "models").symlink_to(models)


def shared_directory() -> Path:
    """The session's tiny base as a Hugging Face directory."""
    return ensure_base(shared_tiny(), session_directory() / "models")


def made_up_preferences(count: int, practice: str | None = None) -> list[Preference]:
    """Preferences for the shorter of two made-up answers; every tenth prompt or so is held out."""
    words = random.Random(0)
    made = []
    for number in range(count):
        question = f"Question {number} about {words.choice(WORDS)}?"
        made.append(
            Preference(
                preference_id=f"pref_{number:04}",
                prompt=(Message(role="user", content=question),),
                chosen=" ".join(words.choices(WORDS, k=4)),
                rejected=" ".join(words.choices(WORDS, k=14)),
                source="practice" if practice else "trl",
                weight=1.0,
                rater=None,
                pick_id=None,
                versions=(),
                practice=practice,
                created_at=datetime(2026, 1, 1, tzinfo=UTC),
            )
        )
    return made


def random_adapter(base_dir: Path, out: Path, seed: int = 0, scale: float = 0.3) -> Path:
    """A LoRA adapter that changes what the base says, without training: PEFT form, `lora_B` random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale / parameter.shape[0] ** 0.5)
    model.save_pretrained(out)
    return out


def loud_adapter(path: Path) -> Path:
    """A random adapter on the embedded model, as GGUF: no good, but nobody can miss it."""
    dice = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for layer in range(8):
        name = f"blk.{layer}.ffn_down.weight"
        writer.add_tensor(f"{name}.lora_a", dice.normal(size=(2, 1536)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", dice.normal(size=(576, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_greedy(gguf: Path, adapter: Path | None, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Token ids that llama.cpp generates greedily, up to the end of the answer (in a process of its own: native code).

    Tokens of a single byte are left out, for the server reports a character in several of them as one.
    """
    request = {"gguf": str(gguf), "adapter": str(adapter or ""), "prompts": prompts, "tokens": tokens}
    done = subprocess.run(
        [sys.executable, "-c", _LLAMA],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return [[token for token in answer if token >= FIRST_MERGED_TOKEN] for answer in answers]


def transformers_greedy(
    directory: Path, adapter: Path | None, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    """The same from transformers with PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    generated = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(tokens):
                best = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
                if int(best) == END_OF_ANSWER:
                    break
        generated.append([token for token in ids[0, len(prompt) :].tolist() if token >= FIRST_MERGED_TOKEN])
    return generated


_LLAMA = """
import json, sys, xllamacpp
request = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.fit_params = request["gguf"], 1024, False, False
if request["adapter"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
server = xllamacpp.Server(params)
answers = []
for prompt in request["prompts"]:
    ask = {"prompt": prompt, "n_predict": request["tokens"], "temperature": 0, "n_probs": 1}
    answer = server.handle_completions({**ask, "cache_prompt": False})
    answers.append([token["id"] for token in answer["choices"][0]["logprobs"]["content"]])
print()
print(json.dumps(answers))
"""


@lru_cache(maxsize=1)
def session_directory() -> Path:
    """Where the session's models lie; removed when it ends."""
    directory = Path(tempfile.mkdtemp(prefix="zephyr-loop-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
