"""Test support: a small tokenizer with its chat template for each family of chat models, built on the spot.

Letters are tokens; the special tokens, what is plain text to the tokenizer, and how a template puts them around
messages are as in the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from feedback_store.records import Message

_EACH = "{% for message in messages %}"
_ASKED = "{% if add_generation_prompt %}"


@dataclass(frozen=True, slots=True)
class Family:
    """`special` are special tokens, `added` others that the tokenizer knows; `plain` are role markers it does not."""

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bytes_as_pieces: bool = False  # SentencePiece with byte fallback; else byte-level BPE
    normalised: bool = False  # a normaliser maps full-width letters before special tokens are looked for
    has_system: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.special, *self.added, *self.plain)


FAMILIES = {
    "chatml": Family(
        _EACH + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        + _ASKED + "<|im_start|>assistant\n{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<think>", "</think>", "    "),
    ),
    "zephyr": Family(
        _EACH + "<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
        + _ASKED + "<|assistant|>\n{% endif %}",
        ("<unk>", "<s>", "</s>"),
        plain=("<|system|>", "<|user|>", "<|assistant|>"),
        bytes_as_pieces=True,
    ),
    "llama-2": Family(
        "{% set system = messages[0].content if messages[0].role == 'system' else none %}" + _EACH
        + "{% if message.role == 'user' %}<s>[INST] "
        "{% if system is not none and loop.index0 == 1 %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ message.content.strip() }} [/INST]"
        "{% elif message.role == 'assistant' %} {{ message.content.strip() }} </s>{% endif %}{% endfor %}",
        ("<unk>", "<s>", "</s>"),
        plain=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        bytes_as_pieces=True,
    ),
    "llama-3": Family(
        "<|begin_of_text|>" + _EACH + "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        + _ASKED + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|python_tag|>", "<|reserved_special_token_0|>"),
    ),
    "gemma": Family(
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _EACH
        + "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}" + _ASKED + "<start_of_turn>model\n{% endif %}",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ("<unused7>", "[multimodal]", "<table>", "\n\n"),
        bytes_as_pieces=True,
        has_system=False,
    ),
    "phi-3": Family(
        _EACH + "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
        + _ASKED + "<|assistant|>\n{% endif %}",
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        bytes_as_pieces=True,
    ),
    "deepseek": Family(
        "<｜begin▁of▁sentence｜>" + _EACH + "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'user' %}<｜User｜>{{ message.content }}"
        "{% else %}<｜Assistant｜>{{ message.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        + _ASKED + "<｜Assistant｜>{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
    "plain words": Family(
        _EACH + "{% if message.role == 'system' %}{{ message.content }}\n\n{% elif message.role == 'user' %}"
        "USER: {{ message.content }}\n{% else %}ASSISTANT: {{ message.content }}</s>\n{% endif %}{% endfor %}"
        + _ASKED + "ASSISTANT:{% endif %}",
        ("<unk>", "<s>", "</s>"),
        plain=("USER:", "ASSISTANT:"),
        normalised=True,
    ),
}  # fmt: skip


@lru_cache(maxsize=len(FAMILIES))
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a family, as transformers loads one."""
    family = FAMILIES[name]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    if not family.bytes_as_pieces:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=family.bytes_as_pieces))
    if family.bytes_as_pieces:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.normalizer = normalizers.NFKC() if family.normalised else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, normalized=family.normalised) for one in family.special])
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=family.template, eos_token=family.special[-1]
    )


def render(tokenizer: Any, messages: list[Message]) -> tuple[list[int], str]:
    """Token ids of the prompt these messages make, and what the model reads there as text."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return list(ids), read
