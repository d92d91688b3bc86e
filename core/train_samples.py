"""A few fixed prompts, answered every so many steps while a stage trains: what it learns, to be read.

The model answers as it is at that step, all prompts in one batch, with a cache and without gradients. Training does not
notice: the modes of its modules, the random generators and the tokenizer are as they were, and a test holds that. It
costs the time it takes, which every event tells. A sample that fails ends the samples, never the stage.
"""

import contextlib
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.chat import TemplateError
from core.data import Conversation, drawn
from core.evaluate_model import Answerer
from core.heldout import DRAW_SEED, Prompt, prompts_of
from core.plan import SamplesPlan
from core.prepare import StageData
from core.train_events import EventCallback, Reporter
from core.train_model import Loaded


@dataclass(frozen=True)
class Sample:
    """A prompt as it is rendered, with its last message and, where known, the expected answer, for people."""

    text: str
    prompt: str
    expected: str


def samples_of(settings: SamplesPlan, loaded: Loaded, data: StageData) -> list[Sample]:
    """The plan's own prompts, else some that are held out, else some that are trained on; the same ones every time."""
    template = loaded.template
    if settings.file:
        chosen = prompts_of(Path(settings.file)).prompts[: settings.count]
    else:
        examples = (data.held_out or data.training).examples
        bad = examples.undesirable.tolist()
        good = {key: at for at, key in enumerate(examples.prompt_keys.tolist()) if not bad[at]}
        order = sorted(good, key=lambda key: drawn(key, DRAW_SEED))
        chosen = [_prompt(examples[good[key]].row) for key in order[: settings.count]]
    found = []
    for prompt in chosen:
        with contextlib.suppress(TemplateError):
            messages = template.prepared([*prompt.messages, *([prompt.expected] if prompt.expected else [])])
            expected = str(messages[-1]["content"]) if prompt.expected else ""
            last = template.prepared(prompt.messages)[-1]
            found.append(Sample(template.render(prompt.messages, prompt.tools), str(last["content"]), expected))
    return found


def _prompt(row: Conversation) -> Prompt:
    return Prompt(row.file, row.line, row.prompt, row.messages[row.last_assistant], tools=row.tools)


def sample_callback(
    settings: SamplesPlan, every: int, loaded: Loaded, data: StageData, trainer: Any, reporter: Reporter
) -> "SampleCallback":
    """The callback for a trainer, whose pace leaves out what the samples take."""
    found = SampleCallback(settings, every, loaded, samples_of(settings, loaded, data), reporter)
    if not found.samples:
        reporter.notice("No samples are taken: no prompt was found for them.", "warning", "Set samples.file.")
    callbacks = trainer.callback_handler.callbacks
    found.clock = next((one for one in callbacks if isinstance(one, EventCallback)), None)
    return found


class SampleCallback(TrainerCallback):
    """Before the first step, every `every` steps and at the end: a `sample` event for each prompt."""

    def __init__(
        self, settings: SamplesPlan, every: int, loaded: Loaded, samples: list[Sample], reporter: Reporter
    ) -> None:
        self.settings, self.every, self.loaded, self.samples, self.reporter = settings, every, loaded, samples, reporter
        self.last_step = -1
        self.clock: EventCallback | None = None
        """Whose pace leaves out the seconds that samples take."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.look(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and not self.reporter.stop_asked:
            self.look(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.last_step != state.global_step and not self.reporter.stop_asked:
            self.look(state.global_step)

    def look(self, step: int) -> None:
        """Answer every prompt as the model is now."""
        self.last_step = step
        if not self.samples:
            return
        begun = time.monotonic()
        answerer = Answerer(self.loaded.model, self.loaded.tokenizer, self.loaded.template)
        try:
            with undisturbed(self.loaded.model, self.loaded.tokenizer):
                answers = answerer.answers([sample.text for sample in self.samples], self.settings.max_new_tokens)
        except Exception as error:  # what is only to be looked at must not be what ends a run
            logging.getLogger(__name__).exception("a sample failed")
            self.samples = []
            text = f"The samples failed ({type(error).__name__}) and end here; training goes on without them."
            self.reporter.notice(text, "warning", "See train.log.")
            return
        seconds = round(time.monotonic() - begun, 2)
        for number, (sample, answer) in enumerate(zip(self.samples, answers, strict=True)):
            self.reporter.event(
                "sample", step=step, number=number, prompt=sample.prompt[-2000:], expected=sample.expected[:2000],
                answer=answer.text, cut=answer.cut, seconds=seconds / len(answers),
            )  # fmt: skip
        if self.clock:
            self.clock.last_time += time.monotonic() - begun


@contextlib.contextmanager
def undisturbed(model: Any, tokenizer: Any) -> Iterator[None]:
    """Inside, the model answers; afterwards modes, random generators and padding side are as they were.

    Unsloth's modules have a switch of their own (`for_inference`, `for_training`), which keeps its way of gradient
    checkpointing; read in its source, not tried on a GPU.
    """
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
    side, modes = tokenizer.padding_side, [(module, module.training) for module in model.modules()]
    unsloth = hasattr(model, "for_inference")
    checkpointing = next(
        (mode for m in model.modules() if (mode := getattr(m, "gradient_checkpointing", False))), False
    )
    model.for_inference() if unsloth else model.eval()
    try:
        yield
    finally:
        if unsloth:
            model.for_training(use_gradient_checkpointing=checkpointing)
        for module, training in modes:
            module.training = training
        tokenizer.padding_side = side
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(states[3])
