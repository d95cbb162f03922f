"""CHILD: two versions of one base beside each other, to be scored and to write. Used by `evaluate.py`.

Adapters share the base's weights; a version that is a whole model is loaded beside it, so memory for two models is
needed then. One at a time is switched on: `with scorer.model(CANDIDATE) as model: …`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback_store.records import Preference
from trainer.base_model import BaseModel, ensure_base
from trainer.errors import JobError
from trainer.packing import pair_layout
from trainer.tokens import PairTokens, tokenise

# PEFT matches adapter names by substring: neither of these is part of the other, nor of a module's name.
CANDIDATE, CHAMPION = "candidate", "champion"
SIDES = (CANDIDATE, CHAMPION)


@dataclass(frozen=True, slots=True)
class PairScore:
    """Summed log-probabilities of both answers, in nats, and how many tokens `chosen` has."""

    chosen: float
    rejected: float
    chosen_tokens: int

    @property
    def favour(self) -> float:
        """How much more likely `chosen` is than `rejected`, in nats."""
        return self.chosen - self.rejected


class Scorer:
    """The candidate and the champion of a comparison.json, or the one of them that is in it, loaded."""

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base_dir = ensure_base(BaseModel.from_dict(comparison["base"]), Path(comparison["models_dir"]))
        self._max_length = comparison["max_length"]
        self._device = _device(comparison["device"])
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        dtype = torch.bfloat16 if comparison["precision"] == "bf16" else torch.float32

        def load(directory: str | Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)

        sides = {name: comparison[name] for name in SIDES if name in comparison}
        self._adapters = {name: side["adapter"] for name, side in sides.items() if side["adapter"]}
        self._whole = {name: load(side["model"]) for name, side in sides.items() if side.get("model")}
        model: Any = load(base_dir) if len(self._whole) < len(sides) else None
        for number, (name, path) in enumerate(self._adapters.items()):
            if number == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                model.load_adapter(path, name)
        self._models = {name: self._whole.get(name, model).to(self._device).eval() for name in sides}

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """The model of one side, its adapter switched on, or off for the base."""
        model, base = self._models[name], nullcontext()
        if name in self._adapters:
            model.set_adapter(name)
        elif self._adapters and name not in self._whole:
            base = model.disable_adapter()
        with base:
            yield model

    def score(self, name: str, preference: Preference) -> PairScore | None:
        """Both answers as one side finds them; None where the prompt is too long."""
        tokens = tokenise(self.tokenizer, preference, self._max_length)
        if not tokens.chosen or not tokens.rejected:
            return None
        with self.model(name) as model:
            return score_pair(model, tokens, self._device)


def score_pair(model: Any, tokens: PairTokens, device: Any) -> PairScore:
    """Both answers of one pair as `model` finds them.

    Both answers stand behind one prompt in one row; a mask hides `chosen` from `rejected` and position ids start again
    after the prompt, which gives the same numbers as two passes with less work.
    """
    import torch

    layout = pair_layout(len(tokens.prompt), len(tokens.chosen), len(tokens.rejected))
    answers = tokens.chosen + tokens.rejected
    with torch.no_grad():  # not inference_mode: a model that is being trained may keep what it makes here
        logits = model(
            input_ids=torch.tensor([tokens.prompt + answers], device=device),
            position_ids=torch.tensor([layout.positions], device=device),
            attention_mask=layout.visible().to(device)[None, None],
            logits_to_keep=torch.tensor(layout.predicting, device=device),
        ).logits[0]
        wanted = torch.tensor(answers, device=device)[:, None]
        each = torch.log_softmax(logits.float(), dim=-1).gather(-1, wanted).double()
    cut = len(tokens.chosen)
    return PairScore(float(each[:cut].sum()), float(each[cut:].sum()), cut)


def _device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise JobError("This evaluation was started for a GPU but torch sees none. Check the driver and torch's build.")
    return "cuda"
