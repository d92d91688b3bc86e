"""Attention over rows of many lengths, with heads that share keys, as Unsloth asks PyTorch 2.11 for it."""

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from core.train_attention import attention_with_shared_heads


def of_pytorch_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """That function's arguments; each row's causal attention by itself, and as many keys as heads."""
    assert query.shape == key.shape == value.shape and window_size == (-1, 0)
    ends = cu_seq_q.tolist()
    rows = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    parts = [[whole[row].transpose(0, 1) for whole in (query, key, value)] for row in rows]
    found = [scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]
    return torch.cat([part.transpose(0, 1) for part in found])


def test_heads_may_share_keys_where_pytorch_lets_them_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", of_pytorch_2_11)
    attention_with_shared_heads()
    given: Any = varlen.varlen_attn
    asked_for = {"window_size", "enable_gqa", "scale"}  # by Unsloth
    assert asked_for <= inspect.signature(given).parameters.keys()
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 3, 4, 9])
    found = given(query, key, value, ends, ends, 5, 5, scale=0.3, window_size=(-1, 0), enable_gqa=True)
    wanted = []
    for start, end in ((0, 3), (3, 4), (4, 9)):
        row = [whole[start:end].transpose(0, 1) for whole in (query, key, value)]
        wanted.append(scaled_dot_product_attention(*row, is_causal=True, scale=0.3, enable_gqa=True).transpose(0, 1))
    torch.testing.assert_close(found, torch.cat(wanted))
    mine = torch.autograd.grad(found.square().sum(), (query, key, value))
    torch.testing.assert_close(mine, torch.autograd.grad(torch.cat(wanted).square().sum(), (query, key, value)))
    own = of_pytorch_2_11(query, query, query, ends, ends, 5, 5, window_size=(-1, 0))
    assert torch.equal(given(query, query, query, ends, ends, 5, 5, window_size=(-1, 0)), own)


def test_a_pytorch_that_can_is_left_alone() -> None:
    before = varlen.varlen_attn
    attention_with_shared_heads()
    assert ("enable_gqa" in inspect.signature(before).parameters) == (varlen.varlen_attn is before)
