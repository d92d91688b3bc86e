"""Does an exported model answer as the trained one? Greedy answers to a few prompts, and their logits compared."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core.artefacts import Trained
from core.chat import Template
from core.data import Conversation, read_rows
from core.data_reader import Rows
from core.errors import FinetuiError
from core.plan import Plan
from core.prepare import stage_ledger
from core.sources import ModelSource, demo_files
from core.train_model import load_base, only_unsloth_reads

LONGEST_PROMPT = 1024
ROWS_LOOKED_AT = 2000
FIXED_PROMPTS = ("What is 12345 + 678?", "Name three colours.", "Write one sentence about the sea.")
# Where words are cut is where converters go wrong: digits, code, accents; and, less often met, odd spaces and scripts.
PROBES = (
    "The year 1234567 and 3.14159, 007, 1,000,000", '{"minutes": 5, "id": "a1b2"}', "naïve café Größe – “quotes” …",
    "def f(x):\n    return x**2  # 100%", "don't we'll I'M",
)  # fmt: skip
ODD_PROBES = ("  two  spaces\t tab\n\nlines \n ", "日本語 русский العربية 🙂👩‍💻")


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and the expected answer as text; empty where none is known."""

    text: str
    ids: list[int]
    expected: str


@dataclass(frozen=True)
class Agreement:
    """How far one model's next tokens are those of another, along the other's own answers."""

    prompts: int
    tokens: int
    same_tokens: int
    same_answers: int
    max_difference: float
    """Largest difference of a logit."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""

    @property
    def share(self) -> float:
        return self.same_tokens / self.tokens if self.tokens else 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts, "tokens": self.tokens, "same_answers": self.same_answers,
            "token_agreement": round(self.share, 5), "max_logit_difference": round(self.max_difference, 5),
            "mean_kl": round(self.mean_kl, 7),
        }  # fmt: skip


def questions(plan: Plan, template: Template, notify: Callable[[str], None]) -> list[Question]:
    """The prompts of the check: held-out rows where the plan has some, else training rows, else three fixed ones."""
    found = []
    for row in _rows(plan, notify):
        text = template.render(row.prompt, row.tools)
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= LONGEST_PROMPT:
            right = template.prepared([*row.prompt, row.messages[row.last_assistant]])[-1]["content"]
            found.append(Question(text, ids, str(right)))
        if len(found) >= plan.export.check_prompts:
            break
    for words in FIXED_PROMPTS[: max(0, plan.export.check_prompts - len(found))] if len(found) < 3 else ():
        text = template.render([{"role": "user", "content": words}], None)
        found.append(Question(text, template.tokenizer(text, add_special_tokens=False)["input_ids"], ""))
    return found


def _rows(plan: Plan, notify: Callable[[str], None]) -> list[Conversation]:
    """Rows with different prompts; none where their files are gone."""
    stage = plan.training_stages[-1]
    settings = plan.stage(stage)
    try:
        if plan.evaluate.file:
            rows = read_rows(Path(plan.evaluate.file), "sft").used
        elif settings.data.demo:
            rows = read_rows(demo_files()["evaluate"], "sft").used
        else:
            ledger = stage_ledger(settings, stage, notify)
            held_out = ledger.evaluation()
            chosen = held_out if len(held_out) else ledger.training()[:ROWS_LOOKED_AT]
            rows = [row for row in Rows(ledger).each(chosen) if row.label is not False and row.prompt]
    except FinetuiError as error:
        notify(f"the rows cannot be read, fixed prompts are asked: {error.message}")
        return []
    return list({row.prompt_key: row for row in rows}.values())


# Models ---------------------------------------------------------------------------------------------------------------


def trained_model(plan: Plan, source: ModelSource, adapter: Trained) -> Any:
    """The base as it was trained on, in the plan's number format and bits, with the adapter on top.

    Raises FinetuiError for what Unsloth alone reads: it would change how the merged one is read after it.
    """
    if only_unsloth_reads(plan, source=source):
        raise FinetuiError("gpt-oss in 4 bit cannot be asked beside its merged form.")
    model = PeftModel.from_pretrained(load_base(plan, source), str(adapter.folder))
    return model.eval()


def exported_model(folder: Path, device: str) -> Any:
    """A merged model: in float32 on a CPU (sums in 16 bit are coarse there), as stored on a GPU."""
    arguments: dict[str, Any] = {"device_map": {"": 0}} if device == "cuda" else {}
    dtype: Any = "auto" if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **arguments).eval()


def room_for(parameters: int, device: str, *, packed: bool = False) -> str:
    """Why a model of so many parameters cannot be loaded to be asked; empty where it can."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU here"
        needed, free = parameters * (0.8 if packed else 2.2) + (1 << 30), torch.cuda.mem_get_info()[0]
    else:
        needed, free = parameters * 4.4 + (1 << 29), psutil.virtual_memory().available
    place = "of GPU memory" if device == "cuda" else "of RAM"
    return "" if needed <= free else f"{needed / 2**30:.1f} GiB {place} are needed and {free / 2**30:.1f} are free"


def forget() -> None:
    """Give the memory of models that nobody holds any more back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def greedy(model: Any, ids: list[int], limit: int, ends: set[int]) -> list[int]:
    """The model's greedy answer to one prompt, its end token included; at most `limit` tokens."""
    given = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=limit, do_sample=False, temperature=None,
        top_p=None, top_k=None, repetition_penalty=1.0, pad_token_id=min(ends), eos_token_id=sorted(ends),
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


@torch.no_grad()
def forced(model: Any, ids: list[int], answer: list[int]) -> torch.Tensor:
    """Logits before each token of `answer`, given all before it: shape (tokens, vocabulary), float32 on the CPU."""
    given = torch.tensor([[*ids, *answer]], device=model.device)
    logits = model(input_ids=given, use_cache=False).logits[0, len(ids) - 1 : -1]
    return logits.float().cpu()


def ends_of(tokenizer: Any, model: Any) -> set[int]:
    """Tokens that end an answer."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return {token for token in [tokenizer.eos_token_id, *own] if token is not None}


def compare(
    asked: list[Question], answers: list[list[int]], expected: list[torch.Tensor], seen: list[torch.Tensor]
) -> Agreement:
    """`seen` logits against the `expected` ones of the model that gave `answers`. A vocabulary that was padded
    differently is compared as far as both go."""
    same_tokens = same_answers = tokens = 0
    largest = divergence = 0.0
    for answer, right, other in zip(answers, expected, seen, strict=True):
        width = min(right.shape[1], other.shape[1])
        right, other = right[:, :width], other[:, :width]
        matches = other.argmax(1) == torch.tensor(answer)
        tokens += len(answer)
        same_tokens += int(matches.sum())
        same_answers += bool(matches.all())
        largest = max(largest, float((right - other).abs().max()) if answer else 0.0)
        log_right, log_other = right.log_softmax(1), other.log_softmax(1)
        divergence += float((log_right.exp() * (log_right - log_other)).sum())
    return Agreement(len(asked), tokens, same_tokens, same_answers, largest, divergence / max(tokens, 1))
