"""DPO (Rafailov et al., 2023) by TRL's trainer, with a step that does each piece of work once.

`PairTrainer` changes what a step computes, not what it means: losses, gradients and log-probabilities are TRL's
(`tests/test_dpo_trainer.py` holds both against each other). What it leaves out:

    the prompt twice       chosen and rejected stand behind one prompt             `packing.py`
    padding                pairs lie behind one another, up to a budget of tokens  `packing.py`, `pair_attention.py`
    unused logits          the LM head runs on answer tokens, a chunk at a time     `answer_logps.py`
    the reference          scored once for each pair, ever                         `reference_cache.py`

A step is one call for all pairs of a process; rows are packed within it, so an optimizer step is `batch_size` pairs
over all processes however they are packed, and the same step has the same loss on any number of processes: sums are
divided by the pairs (for `sft`: the chosen tokens) of the whole step. Each pair's loss is multiplied by its weight.

`StockTrainer` is TRL's own step with weights, for what the fast one cannot do; `why_stock` and
`PairTrainer.difference` say what that is. Called by `methods/dpo.py`.

Not covered: FSDP and DeepSpeed (TRL's step is used), images, losses TRL has and recipes do not. Not run: a GPU.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

from trainer.answer_logps import plain_head, score_tokens
from trainer.packing import balanced, pack
from trainer.pair_attention import attending_by_pairs
from trainer.pair_losses import PairScores, pair_losses
from trainer.pair_rows import COLUMNS, Row, WeightedPair, by_answer, collate, columns, row_of, tokens_of
from trainer.reference_cache import PairLogps, ReferenceCache, pair_key
from trainer.tokens import PairTokens

TOKENS_ON_CPU = 1024  # beyond a few hundred tokens a longer row is no faster there, only larger
TOKENS_ON_GPU = 8192
LOSSES = frozenset({"sigmoid", "ipo", "robust", "apo_zero", "sft"})
PROBE_TOKENS = 48  # of the prompt's end and of each answer, compared once before training
PROBE_TOLERANCE = {torch.float32: 1e-4}  # relative, of a summed log-probability; other precisions: the line below
PROBE_TOLERANCE_LOW = 2e-2
REFERENCES_AT_ONCE = 32  # pairs between two writes of the cache


def why_stock(config: Any, arguments: Any) -> str | None:
    """Why a model of this configuration cannot take the fast step, before it is loaded; None when nothing is known."""
    from accelerate.utils import parse_flag_from_env

    text = config.get_text_config()
    max_length = arguments.max_length
    sharded = next((name for name in ("FSDP", "DEEPSPEED") if parse_flag_from_env(f"ACCELERATE_USE_{name}")), None)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reasons = {
        f"it is not verified under {sharded}": sharded,
        "the model is multimodal": text is not config or getattr(config, "vision_config", None),
        "the model has an encoder": getattr(config, "is_encoder_decoder", False),
        f"attention slides over {window} tokens, max_length is {max_length}": window and window < max_length,
        f"layers of the kind {', '.join(sorted(layers))}": layers,
        "router losses are on": getattr(text, "output_router_logits", False),
        f"losses {arguments.loss_type}": not set(arguments.loss_type) <= LOSSES,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on tokenised pairs, `tokens_per_batch` tokens in memory at once. `facts` goes to training.json."""

    def __init__(self, *, args: Any, rows: Sequence[WeightedPair], tokens_per_batch: int | None, **others: Any) -> None:
        args = copy(args)
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        # Without it TRL would load a second model for full fine-tuning; the references come from `add_references`.
        args.precompute_ref_log_probs = others.get("peft_config") is None
        share, processes = args.per_device_train_batch_size, args.world_size
        data = Dataset.from_list(in_steps(rows, share * processes, processes))
        super().__init__(args=args, train_dataset=data, data_collator=collate, **others)
        on_cpu = self.accelerator.device.type == "cpu"
        self.tokens_per_batch = tokens_per_batch or (TOKENS_ON_CPU if on_cpu else TOKENS_ON_GPU)
        self.train_dataset: Any
        self._is_adapter = hasattr(self.model, "disable_adapter")
        self._causal_lm = self.model.get_base_model() if self._is_adapter else self.model
        _give_row_forward(self._causal_lm)
        if args.activation_checkpointing and _fits(self._causal_lm, self.tokens_per_batch):
            self.args.activation_checkpointing = self.args.gradient_checkpointing = False
        self.facts: dict[str, Any] = {
            "fast_step": True,
            "tokens_per_batch": self.tokens_per_batch,
            "recompute": bool(self.args.activation_checkpointing),
        }

    @property
    def precision(self) -> str:
        """The precision of log-probabilities in words; another one gives other numbers."""
        quantized = getattr(self._causal_lm.config, "quantization_config", None)
        autocast = self.accelerator.mixed_precision
        return f"{self._causal_lm.dtype} autocast {autocast} {self.accelerator.device.type} {quantized or ''}".strip()

    # The data: tokens, not text

    def _prepare_dataset(self, dataset: Any, *_others: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_others: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, "ref_chosen_logps", "ref_rejected_logps"]

    # The step

    def training_step(self, model: Any, inputs: dict[str, Tensor], _items: Any = None) -> Tensor:
        """Forward and backward of all rows of a step; gradients are exchanged once, with the last row."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with attending_by_pairs(self._causal_lm.config):
            return self._go_through(model, inputs, learn=True)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_others: Any, **_more: Any) -> Tensor:
        """The loss of held-out pairs (`evaluate`)."""
        with attending_by_pairs(self._causal_lm.config):
            return self._go_through(model, inputs, learn=False)

    def _go_through(self, model: Any, inputs: dict[str, Tensor], *, learn: bool) -> Tensor:
        weight = inputs["weight"]
        counts = torch.stack([(weight > 0).sum(), ((weight > 0) * inputs["lengths"][:, 1]).sum()]).float()
        processes = 1
        if learn:  # DDP takes the mean over processes, each of which may have its own number of pairs
            counts, processes = self.accelerator.reduce(counts, "sum"), self.accelerator.num_processes
        pairs, chosen_tokens = counts.clamp(min=1)
        rows = pack(inputs["lengths"].sum(dim=1).tolist(), self.tokens_per_batch)
        total = torch.zeros((), device=weight.device)
        seen: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=weight.device))
        for number, indices in enumerate(rows):
            with nullcontext() if number == len(rows) - 1 or not learn else self.accelerator.no_sync(model):
                row = row_of(inputs, indices)
                scores = PairScores.of(model(row=row), row, weight[indices], inputs["reference"][indices])
                loss = processes * (
                    self._preference_loss(scores) / pairs + self._sft_weight * scores.chosen_nll / chosen_tokens
                )
                if learn:
                    self.accelerator.backward(loss)
            total += loss.detach()
            for name, value in scores.measured(self.beta).items():
                seen[name] += value
        self._note(seen)
        return total

    @property
    def _sft_weight(self) -> float:
        return float(sum(part for kind, part in zip(self.loss_types, self.loss_weights, strict=True) if kind == "sft"))

    def _preference_loss(self, scores: PairScores) -> Tensor:
        """The weighted sum over the pairs of a row."""
        each = sum(
            part * pair_losses(kind, scores, self.beta, self.label_smoothing)
            for kind, part in zip(self.loss_types, self.loss_weights, strict=True)
            if kind != "sft"
        )
        return (each * scores.weight).sum()

    def _note(self, seen: dict[str, Tensor]) -> None:
        """One value of each of TRL's metrics, over all processes, for `log`."""
        names = sorted(seen)
        sums = self.accelerator.reduce(torch.stack([seen[name] for name in names]).double(), "sum")
        total = dict(zip(names, sums.tolist(), strict=True))
        mode = "train" if self.model.training else "eval"
        pairs, chosen, rejected = (max(total.pop(name), 1) for name in ("pairs", "tokens/chosen", "tokens/rejected"))
        found = {
            "lengths/chosen": chosen / pairs,
            "lengths/rejected": rejected / pairs,
            "logits/chosen": total.pop("logits/chosen") / chosen,
            "logits/rejected": total.pop("logits/rejected") / rejected,
            "mean_token_accuracy": total.pop("top1") / chosen,
            "entropy": total.pop("entropy") / (chosen + rejected),
        }
        if mode == "eval":  # without gradients these two are not at hand
            del found["entropy"], found["mean_token_accuracy"]
        else:
            self._total_train_tokens += int(total.pop("read"))
            found["num_tokens"] = self._total_train_tokens
        total.pop("read", None)
        found |= {name: value / pairs for name, value in total.items()}
        for name, value in found.items():
            self._metrics[mode][name].append(value)

    # The reference

    def add_references(self, cache: ReferenceCache, report: Callable[[int, int], None]) -> None:
        """Fill in what the reference thinks of each training pair: from the cache, else computed and remembered.

        Before the first step only: the reference is the model training starts from. `report` gets pairs done, of all.
        """
        from accelerate.utils import broadcast_object_list, gather_object

        keys = [pair_key(tokens_of(row)) if row["weight"] else "" for row in self.train_dataset]
        rows = {key: tokens_of(row) for key, row in zip(keys, self.train_dataset, strict=True) if key}
        known = cache.load() if self.accelerator.is_main_process else {}
        shared = [{key: known[key] for key in rows if key in known}]
        broadcast_object_list(shared)  # another run may be writing: all processes must miss the same pairs
        found = dict(shared[0])
        missing = [key for key in rows if key not in found]
        # Each pair has its row to itself on CPU, so that its number does not hang on which other pairs were missing.
        mine = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        computed: dict[str, PairLogps] = {}
        for start in range(0, len(mine), REFERENCES_AT_ONCE):
            report(len(found) + start * self.accelerator.num_processes, len(rows))
            some = mine[start : start + REFERENCES_AT_ONCE]
            new = dict(zip(some, self.reference_logps([rows[key] for key in some]), strict=True))
            cache.append(new)
            computed |= new
        for part in gather_object([computed]):
            found |= part
        logps = [found[key] if key else PairLogps(0.0, 0.0) for key in keys]  # those that fill up count nowhere
        self.train_dataset = self.train_dataset.add_column("ref_chosen_logps", [one.chosen for one in logps])
        self.train_dataset = self.train_dataset.add_column("ref_rejected_logps", [one.rejected for one in logps])
        self.facts["references"] = {"cached": len(rows) - len(missing), "computed": len(missing)}

    def reference_logps(self, pairs: Sequence[PairTokens]) -> list[PairLogps]:
        """The summed log-probabilities of both answers by the reference, in the order given."""
        with self.model.disable_adapter() if self._is_adapter else nullcontext():
            found: list[PairLogps] = self.logps(pairs)
        return found

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def logps(self, pairs: Sequence[PairTokens]) -> list[PairLogps]:
        """The summed log-probabilities of both answers by the model as it is, without gradients."""
        batch = self._prepare_inputs(collate([columns(pair) for pair in pairs]))
        budget = 0 if self.accelerator.device.type == "cpu" else self.tokens_per_batch
        found: dict[int, PairLogps] = {}
        with attending_by_pairs(self._causal_lm.config), self.accelerator.autocast():
            for indices in pack(batch["lengths"].sum(dim=1).tolist(), budget):
                row = row_of(batch, indices)
                sums = by_answer(self._causal_lm(row=row).logps, row).tolist()
                found |= {index: PairLogps(*both) for index, both in zip(indices, sums, strict=True)}
        return [found[index] for index in range(len(pairs))]

    # Whether all this is true of the model at hand

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def difference(self) -> str | None:
        """Why the fast step is not exact for this model; None when it is.

        Scores the ends of two pairs both ways: packed in one row, and one answer at a time by the plain model.
        """
        reason = plain_head(self._causal_lm)
        if reason:
            return reason
        pairs = [_ends(tokens_of(row)) for row in self.train_dataset.select(range(min(2, len(self.train_dataset))))]
        pairs = [pair for pair in pairs if pair.prompt]
        try:
            batch = self._prepare_inputs(collate([columns(pair) for pair in pairs]))
            with attending_by_pairs(self._causal_lm.config), self.accelerator.autocast():
                row = row_of(batch, range(len(pairs)))
                packed = by_answer(self._causal_lm(row=row).logps, row).flatten().tolist()
            plain = [self._plain_logp(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"the model cannot be called so: {str(error).strip().partition(chr(10))[0]}"
        off = max(abs(one - other) / max(abs(other), 1.0) for one, other in zip(packed, plain, strict=True))
        tolerance = PROBE_TOLERANCE.get(self._causal_lm.dtype, PROBE_TOLERANCE_LOW)
        return None if off <= tolerance else f"its log-probabilities are {off:.1e} off the plain ones"

    def _plain_logp(self, prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer], device=self.accelerator.device)
        with self.accelerator.autocast():
            logits = self._causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        each = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, len(prompt) :, None])
        return float(each.sum())


class StockTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's own step on the same tokenised pairs and weights."""

    def __init__(self, *, args: Any, rows: Sequence[WeightedPair], why: str, **others: Any) -> None:
        is_weighted = any(weight != 1.0 for _, weight in rows)
        data = Dataset.from_list([columns(pair, weight) for pair, weight in rows])
        super().__init__(args=stock_arguments(args, is_weighted), train_dataset=data, **others)
        self.facts = {"fast_step": False, "fast_step_off_because": why}
        if is_weighted:
            self.data_collator: Any = _with_weight(self.data_collator)

    def _prepare_dataset(self, dataset: Any, *_others: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, "ref_chosen_logps", "ref_rejected_logps"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weight = inputs.pop("weight", None)
        found = super()._compute_loss(model, inputs, return_outputs)
        if weight is None:
            return found
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["weights"].append(float(self.accelerator.gather(weight).mean()))
        return (found[0] * weight.mean(), found[1]) if return_outputs else found * weight.mean()


def in_steps(rows: Sequence[WeightedPair], batch_size: int, num_processes: int) -> list[dict[str, Any]]:
    """The data set in which each step holds its pairs, dealt out evenly to the processes.

    With several processes a short last step is filled up by pairs of weight 0, or it would be filled by old ones.
    """
    order = balanced([pair.total for pair, _ in rows], batch_size, num_processes)
    data = [columns(*rows[index]) for index in order]
    if num_processes > 1 and len(data) % batch_size:
        token = rows[0][0].prompt[:1]
        data += [columns(PairTokens(token, token, token), 0.0)] * (-len(data) % batch_size)
    return data


def stock_arguments(args: Any, is_weighted: bool) -> Any:
    """The arguments with a micro batch of one pair where weights differ: TRL takes the mean of a micro batch."""
    args = copy(args)
    if is_weighted:
        args.gradient_accumulation_steps *= args.per_device_train_batch_size
        args.per_device_train_batch_size = 1
    return args


def _fits(model: Any, tokens: int) -> bool:
    """Whether the activations of so many tokens fit beside the model on its device; a guess on the safe side."""
    if model.device.type != "cuda":
        return True
    config = model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    each = config.num_hidden_layers * (14 * config.hidden_size + 4 * wide) * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    return bool(tokens * each < 0.7 * free)


def _with_weight(collator: Any) -> Any:
    def collate_with_weight(examples: list[dict[str, Any]]) -> dict[str, Any]:
        weight = torch.tensor([example["weight"] for example in examples], dtype=torch.float32)
        return {**collator(examples), "weight": weight}

    return collate_with_weight


def _give_row_forward(model: Any) -> None:
    """Let a causal LM take `row=` and answer with TokenScores; every other call stays what it is."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, row: Row | None = None, **others: Any) -> Any:
        if row is None:
            return plain(*args, **others)
        hidden = self.base_model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            # Four dimensions: taken as it is, no mask is made. `pair_attention` goes by the row and never reads it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device),
            use_cache=False,
            row=row,
        ).last_hidden_state[0]
        return score_tokens(hidden[row.predicting], self.get_output_embeddings().weight, row.targets)

    model.forward = types.MethodType(forward, model)


def _ends(pair: PairTokens) -> PairTokens:
    """The end of the prompt and the beginnings of both answers."""
    return PairTokens(pair.prompt[-PROBE_TOKENS:], pair.chosen[:PROBE_TOKENS], pair.rejected[:PROBE_TOKENS])
