"""The models a run made, one base with an adapter for each, and how they answer. For evaluation, samples and chat."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from core.chat import PROBE, Template
from core.plan import Plan
from core.runs import Run
from core.sources import Notify, model_source
from core.train_fit import out_of_memory
from core.train_model import load_base
from core.train_tokenizer import load_tokenizer
from core.variants import Variant, variants_of

SEED = 0


@dataclass(frozen=True)
class Answer:
    """What a model wrote, without the token that ends its turn; `cut` where the limit ended it."""

    text: str
    tokens: int
    cut: bool


class Answerer:
    """A base model on its device with an adapter for each of `variants`; one of them answers at a time."""

    def __init__(self, model: Any, tokenizer: Any, template: Template, variants: Sequence[Variant] = ()) -> None:
        self.model, self.tokenizer, self.template, self.variants = model, tokenizer, template, list(variants)

    @classmethod
    def load(cls, run: Run, plan: Plan, notify: Notify) -> "Answerer":
        """The run's models, as many as it has. Raises FinetuiError."""
        source = model_source(plan.model, notify)
        variants = variants_of(run, plan, source.adapter)
        tokenizer, template, _ = load_tokenizer(plan, source)
        model = load_base(plan, source)
        for variant in variants:
            if variant.folder is None:
                continue
            if isinstance(model, PeftModel):
                model.load_adapter(str(variant.folder), adapter_name=variant.name)
            else:
                model = PeftModel.from_pretrained(model, str(variant.folder), adapter_name=variant.name)
        model.eval()
        return cls(model, tokenizer, template, variants)

    @contextlib.contextmanager
    def using(self, variant: Variant) -> Iterator[None]:
        """Inside, this variant answers."""
        if variant.folder is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(variant.name)
            yield

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer: the tokenizer's, the model's own, and the one the template ends a turn with."""
        ids = {self.tokenizer.eos_token_id}
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids |= set(own if isinstance(own, list) else [own])
        turn = self.template.tokenize(PROBE)
        last = max(index for index, trained in enumerate(turn.trained) if trained)
        if turn.input_ids[last] in self.template.end_tokens:
            ids.add(turn.input_ids[last])
        return sorted(number for number in ids if number is not None)

    @property
    def context_length(self) -> int | None:
        """The most tokens the model was made for, where it says."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of an answer up to the token that ends it. Tokens that mark a tool call stay in it."""
        end = next((place for place, number in enumerate(ids) if number in self.stop_tokens), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def generation(self, max_new_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
        """Arguments of `generate`: greedy, or drawn from the whole distribution at a temperature."""
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        return {
            **drawn, "max_new_tokens": max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.stop_tokens, "use_cache": True,
        }  # fmt: skip

    def encoded(self, prompts: list[str]) -> Any:
        """Rendered prompts as a batch on the model's device, padded on the left; the tokenizer is as before."""
        side = self.tokenizer.padding_side
        self.tokenizer.padding_side = "left"
        try:
            batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        finally:
            self.tokenizer.padding_side = side
        return batch.to(self.model.device)

    @torch.no_grad()
    def answers(self, prompts: list[str], max_new_tokens: int, temperature: float = 0.0) -> list[Answer]:
        """Answers to rendered prompts, all at once."""
        batch = self.encoded(prompts)
        if temperature > 0:
            torch.manual_seed(SEED)
        output = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            **self.generation(max_new_tokens, temperature),
        )  # fmt: skip
        found = []
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            length = next((place for place, number in enumerate(ids) if number in self.stop_tokens), len(ids))
            found.append(Answer(self.decoded(ids), length, length == len(ids) and length >= max_new_tokens))
        return found

    @torch.no_grad()
    def loss(self, prompt_ids: list[int], answer_ids: list[int]) -> float:
        """The summed loss of an answer's tokens after a prompt."""
        ids = torch.tensor([[*prompt_ids, *answer_ids]], device=self.model.device)
        count = len(answer_ids)
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, -count - 1 : -1]
        return float(functional.cross_entropy(logits.float(), ids[0, -count:], reduction="sum"))


def in_batches(
    count: int, size: int, work: Callable[[range], None], smaller: Callable[[int], None] = lambda size: None
) -> None:
    """`work` on ranges of `size` up to `count`; where memory runs out on halves, down to one, `smaller` being told."""
    start = 0
    while start < count:
        try:
            work(range(start, min(start + size, count)))
        except Exception as error:
            if not out_of_memory(error) or size == 1:
                raise
            error.__traceback__ = None  # its frames hold the tensors
            size = max(1, size // 2)
            smaller(size)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        start += size
