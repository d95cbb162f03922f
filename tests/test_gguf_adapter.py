"""An adapter says the same through llama.cpp as through PEFT; what GGUF cannot express is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from trainer.base_model import embedded, ensure_base
from trainer.errors import JobError
from trainer.gguf_adapter import permute_rows, write_gguf_adapter

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name: https://github.com/huggingface/peft
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[1, 520, 198, 300, 17, 2, 198, 1], [40, 41, 42, 1000, 2000], [333]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.random_adapter(tiny_model.shared_directory(), tmp_path_factory.mktemp("adapter"))


def test_the_same_tokens_from_llama_cpp_and_from_peft(adapter: Path, tmp_path: Path) -> None:
    base = tiny_model.shared_directory()
    gguf = tiny_model.shared_tiny().gguf
    assert gguf is not None
    write_gguf_adapter(adapter, base, tmp_path / "adapter.gguf")

    plain = tiny_model.llama_greedy(gguf, None, PROMPTS, 24)
    adapted = tiny_model.llama_greedy(gguf, tmp_path / "adapter.gguf", PROMPTS, 24)

    assert plain == tiny_model.transformers_greedy(base, None, PROMPTS, 24)
    assert adapted == tiny_model.transformers_greedy(base, adapter, PROMPTS, 24)
    assert all(one != other for one, other in zip(plain, adapted, strict=True))
    assert len({token for answer in plain for token in answer}) > 20, "the tiny model repeats itself"


@pytest.mark.slow
def test_the_embedded_model_too(tmp_path: Path) -> None:
    model = embedded()
    assert model.gguf is not None
    base = ensure_base(model, tmp_path / "models")
    adapter = tiny_model.random_adapter(base, tmp_path / "adapter", scale=6.0)
    write_gguf_adapter(adapter, base, tmp_path / "adapter.gguf")
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]]

    plain = tiny_model.llama_greedy(model.gguf, None, prompts, 8)
    adapted = tiny_model.llama_greedy(model.gguf, tmp_path / "adapter.gguf", prompts, 8)

    assert plain == tiny_model.transformers_greedy(base, None, prompts, 8)
    assert adapted == tiny_model.transformers_greedy(base, adapter, prompts, 8)
    assert plain != adapted


def test_rows_are_interleaved_within_each_head() -> None:
    rows = np.arange(8).reshape(8, 1)
    assert permute_rows(rows, heads=1).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert permute_rows(rows, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", {"use_rslora": True}, "use_rslora"),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ("config.json", {"model_type": "mistral"}, "mistral"),
    ],
)
def test_what_gguf_cannot_express_is_refused(
    adapter: Path, tmp_path: Path, file: str, change: dict[str, object], said: str
) -> None:
    for name, source in (("adapter_config.json", adapter), ("config.json", tiny_model.shared_directory())):
        values = json.loads((source / name).read_text())
        (tmp_path / name).write_text(json.dumps({**values, **(change if name == file else {})}))
    with pytest.raises(JobError, match=said):
        write_gguf_adapter(tmp_path, tmp_path, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
