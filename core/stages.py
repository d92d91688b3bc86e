"""The names of methods and stages. Apart from the plan: what only reads runs need not load pydantic."""

from typing import Literal, get_args

Method = Literal["sft", "kto", "sft-kto"]
METHODS: tuple[Method, ...] = get_args(Method)
TRAINING_STAGES = ("sft", "kto")
EXPORT_STAGES = ("merge", "gguf", "upload")
