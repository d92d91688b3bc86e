"""Log-probabilities of completions without whole logits: the head is applied to a few hundred tokens at a time."""

from typing import Any

import torch
from torch.nn import functional

CHUNK_ROWS = 512
"""Tokens whose logits exist at once: 0.4 GB of fp32 with gpt-oss's vocabulary of 201,088, three times going back."""
TRANSFORMS = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
"""What a model's configuration calls that which is done to the logits after the head."""


class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden · weightᵀ + bias)[target] of each row, shape (rows,), in fp32; the head must be frozen.

    `hidden` (rows, size), `targets` (rows,). Going back the logits are made again, so none are kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, size: int) -> Any:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.size = size
        found = [
            logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            for logits, wanted in zip(_logits(hidden, weight, bias, size), targets.split(size), strict=True)
        ]
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        parts = zip(gradients[0].split(ctx.size), targets.split(ctx.size), strict=True)
        back = []
        for logits, (gradient, wanted) in zip(_logits(hidden, weight, bias, ctx.size), parts, strict=True):
            pull = logits.softmax(1).neg_()
            pull.scatter_add_(1, wanted[:, None], torch.ones_like(pull[:, :1]))
            pull *= gradient[:, None]
            back.append(pull.to(weight.dtype) @ weight)
        return torch.cat(back).to(hidden.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: int) -> Any:
    """The logits in fp32, chunk by chunk."""
    with torch.autocast(hidden.device.type, enabled=False):
        for part in hidden.split(size):
            yield functional.linear(part.to(weight.dtype), weight, bias).float()


def plain_head(model: Any) -> torch.nn.Linear | None:
    """The output head of `model` where the logits are what it makes and nothing more, and it is not trained."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not torch.nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return None if any(getattr(config, name, None) for name in TRANSFORMS) else head


def completion_logps(model: Any, batch: dict[str, torch.Tensor], size: int = CHUNK_ROWS) -> torch.Tensor:
    """Σ log p(token) over each row's completion, shape (rows,).

    `batch` has input_ids, attention_mask and completion_mask, each (rows, length). `model` is called as it is, so what
    wraps it (autocast, an adapter, checkpointing) stays; a hook of this one call lets its head see one token a row.
    """
    from trl.trainer.utils import selective_log_softmax

    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    head, seen = plain_head(model), []

    def first_token(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    hook = head.register_forward_pre_hook(first_token) if head is not None else None
    try:
        logits = model(ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if head is None or len(seen) != 1 or seen[0].shape[:2] != ids.shape:  # a forward that makes its logits otherwise
        if logits.shape[:2] != ids.shape:
            raise RuntimeError("the model's head was called in a way that is not known")
        return selective_log_softmax(logits[:, :-1], ids[:, 1:], row_mask=mask).sum(-1)
    rows = seen[0][:, :-1][mask]
    each: Any = ChunkedLogps.apply(rows, head.weight, head.bias, ids[:, 1:][mask], size)
    return torch.zeros(mask.shape, dtype=each.dtype, device=each.device).masked_scatter(mask, each).sum(-1)
