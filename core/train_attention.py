"""Unsloth, imported so that it uses PyTorch's attention over rows of many lengths in PyTorch 2.11, too."""

import inspect
from typing import Any


def import_unsloth() -> None:
    """Import Unsloth, which replaces parts of transformers, PEFT and TRL: to train, call it before those are imported;
    to read a model alone it may come after them."""
    attention_with_shared_heads()
    import unsloth  # noqa: F401


def attention_with_shared_heads() -> None:
    """Give PyTorch's `varlen_attn` the argument `enable_gqa` where it lacks it.

    For rows laid end to end Unsloth asks for attention once a layer where that function has the argument, which came
    with PyTorch 2.12, and otherwise once a row and layer: 24 times, with gradients as long as the whole batch each.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return
    plain = varlen.varlen_attn
    known = inspect.signature(plain).parameters
    if "enable_gqa" in known or not {"scale", "window_size"} <= known.keys():
        return

    def varlen_attn(
        query: Any, key: Any, value: Any, *lengths: Any, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        if enable_gqa:  # heads × tokens: (tokens, heads, width)
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        return plain(query, key, value, *lengths, scale=scale, window_size=window_size, **more)

    varlen.varlen_attn = varlen_attn
