"""Tile by tile, the same numbers as a softmax over all logits."""

import pytest
import torch

from trainer.answer_logps import TILE, plain_head, score_tokens

WORDS, TOKENS, SIZE = TILE[0] * 2 + 77, TILE[1] + 33, 24


@pytest.mark.parametrize("head_learns", [False, True])
def test_scores_and_gradients_are_those_of_a_plain_softmax(head_learns: bool) -> None:
    dice = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, generator=dice, requires_grad=True)
    head = torch.randn(WORDS, SIZE, generator=dice).requires_grad_(head_learns)
    targets = torch.randint(0, WORDS, (TOKENS,), generator=dice)
    factor = torch.randn(TOKENS, generator=dice)
    with torch.no_grad():
        targets[:100] = (hidden[:100] @ head.t()).argmax(dim=1)

    logits = hidden @ head.t()
    each = torch.log_softmax(logits, dim=1)
    wanted = each.gather(1, targets[:, None])[:, 0]
    wanted_gradients = torch.autograd.grad((wanted * factor).sum(), [hidden, head] if head_learns else [hidden])
    found = score_tokens(hidden, head, targets)
    gradients = torch.autograd.grad((found.logps * factor).sum(), [hidden, head] if head_learns else [hidden])

    torch.testing.assert_close(found.logps, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, -(each.exp() * each).sum(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean_logit, logits.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert found.is_top1[:100].all()
    assert found.is_top1.sum() == (logits.argmax(dim=1) == targets).sum()
    for one, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_gradient_no_second_matrix_product() -> None:
    hidden, head = torch.randn(5, SIZE), torch.randn(100, SIZE)
    found = score_tokens(hidden, head, torch.arange(5))
    torch.testing.assert_close(found.logps, torch.log_softmax(hidden @ head.t(), dim=1)[range(5), range(5)])
    assert not found.logps.requires_grad


def test_bf16_is_summed_in_fp32() -> None:
    hidden, head = torch.randn(TOKENS, SIZE).bfloat16(), torch.randn(WORDS, SIZE).bfloat16()
    targets = torch.arange(TOKENS)
    found = score_tokens(hidden.requires_grad_(), head, targets)
    exact = torch.log_softmax(hidden.float() @ head.float().t(), dim=1).gather(1, targets[:, None])[:, 0]
    assert found.logps.dtype == torch.float32
    torch.testing.assert_close(found.logps, exact, rtol=0, atol=0.1)
    assert torch.autograd.grad(found.logps.sum(), hidden)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("head", "config", "reason"),
    [
        (torch.nn.Linear(2, 3, bias=False), {}, None),
        (torch.nn.Linear(2, 3, bias=True), {}, "the LM head has a bias"),
        (torch.nn.Identity(), {}, "the LM head is not one plain matrix"),
        (torch.nn.Linear(2, 3, bias=False), {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (torch.nn.Linear(2, 3, bias=False), {"logits_scaling": 1.0}, None),
    ],
)
def test_heads_that_are_more_than_a_matrix_are_named(
    head: object, config: dict[str, float], reason: str | None
) -> None:
    class Config:
        def get_text_config(self) -> object:
            return self

    class Model:
        def __init__(self) -> None:
            self.config = Config()

        def get_output_embeddings(self) -> object:
            return head

    model = Model()
    for name, value in config.items():
        setattr(model.config, name, value)
    found = plain_head(model)
    assert found == reason if reason is None else reason in (found or "")
