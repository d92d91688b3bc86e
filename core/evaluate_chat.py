"""The models of a run in a process that talks: ``python -P -m core.evaluate_chat RUN``, started by `core.talk`.

Requests on stdin, one JSON object a line; what is written streams to stdout as it comes. It ends when stdin does.
"""

import contextlib
import gc
import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a fifth of the time

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from core.chat import TemplateError
from core.errors import FinetuiError
from core.evaluate_model import Answerer
from core.heldout import held_out
from core.runs import Run
from core.train_fit import out_of_memory
from core.turns import device_of, in_use

PROMPTS = 30
Request = dict[str, Any]


def main() -> int:
    gc.freeze()  # what was imported stays, and is not looked through again
    gc.enable()
    words, run = sys.stdout, Run(Path(sys.argv[1]))
    if hasattr(os, "nice"):
        os.nice(5)
    with contextlib.redirect_stdout(sys.stderr):
        room = Room(run, words)
        threading.Thread(target=room.listen, name="listen", daemon=True).start()
        try:
            room.open()
        except Exception as error:
            room.refuse(error, None)
            return 1
        while True:
            room.answer(room.requests.get())


class Room:
    """The models and what is asked of them; requests up to the number `halted` are over."""

    def __init__(self, run: Run, words: IO[str]) -> None:
        self.run, self.words = run, words
        self.requests: queue.Queue[Request] = queue.Queue()
        self.newest = self.halted = 0
        self.answerer: Answerer | None = None

    def tell(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self.words, flush=True)

    def listen(self) -> None:
        """Take requests in; the end of stdin is the end of this process, whatever it is doing."""
        for line in sys.stdin:
            with contextlib.suppress(ValueError):
                request = json.loads(line)
                if request["do"] == "stop":
                    self.halted = self.newest
                    with contextlib.suppress(queue.Empty):
                        while True:
                            self._end(self.requests.get_nowait()["id"], 0, 0.0, "stopped")
                else:
                    self.newest = int(request["id"])
                    self.requests.put(request)
        os._exit(0)

    def open(self) -> None:
        """Load the models; then look for prompts that may be tried. Raises FinetuiError."""
        plan = self.run.plan()
        if device_of(plan) != "cpu" and (other := in_use(device_of(plan))):
            self.tell("loading", text=f"{other} trains on this GPU: memory may be short")
        self.tell("loading", text=f"loading {plan.model.name}")
        self.answerer = Answerer.load(self.run, plan, lambda text: self.tell("loading", text=text))
        self.tell("ready", variants=[variant.name for variant in self.answerer.variants], device=plan.device)
        with contextlib.suppress(FinetuiError):
            prepared = self.answerer.template.prepared
            self.tell(
                "prompts",
                prompts=[
                    {
                        "before": prompt.messages[:-1], "user": str(prepared(prompt.messages)[-1]["content"]),
                        "tools": prompt.tools,
                    }
                    for prompt in held_out(plan, None, PROMPTS).prompts
                ],
            )  # fmt: skip

    def answer(self, request: Request) -> None:
        """Stream one answer."""
        try:
            self._answer(request)
        except Exception as error:
            self.refuse(error, request.get("id"))

    def _answer(self, request: Request) -> None:
        answerer = self.answerer
        assert answerer
        variant = next(variant for variant in answerer.variants if variant.name == request["variant"])
        batch = answerer.encoded([answerer.template.render(request["messages"], request.get("tools"))])
        length, limit = batch["input_ids"].shape[1], int(request["max_new_tokens"])
        if answerer.context_length and length + limit > answerer.context_length:
            raise FinetuiError(
                f"The conversation has {length} tokens, the model takes {answerer.context_length} with the answer.",
                "Begin a new one, or allow fewer new tokens.",
            )
        streamer = Streamer(answerer)
        begun = time.monotonic()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                with torch.no_grad(), answerer.using(variant):
                    answerer.model.generate(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Halted(self, request["id"])]),
                        **answerer.generation(limit, float(request["temperature"])),
                    )  # fmt: skip
            except BaseException as error:  # told by the thread that waits for its text
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=work, name="generate")
        worker.start()
        for text in streamer:
            if text:
                self.tell("text", id=request["id"], text=text)
        worker.join()
        if failed:
            raise failed[0]
        reason = "stopped" if request["id"] <= self.halted else "end" if streamer.ended else "length"
        self._end(request["id"], streamer.count, time.monotonic() - begun, reason)

    def _end(self, number: int, tokens: int, seconds: float, reason: str) -> None:
        self.tell("end", id=number, tokens=tokens, seconds=round(seconds, 2), reason=reason)

    def refuse(self, error: BaseException, number: int | None) -> None:
        """Tell what went wrong, in a sentence."""
        logging.getLogger(__name__).error("an answer failed", exc_info=error)
        message, advice = f"{type(error).__name__}: {error}"[:400], ""
        if isinstance(error, FinetuiError):
            message, advice = error.message, error.advice
        elif isinstance(error, TemplateError):
            message, advice = str(error), "Change the system prompt or the tools (F2)."
        elif out_of_memory(error):
            message, advice = "The GPU's memory ran out.", "Begin a new conversation, or end what else runs there."
        self.tell("error", id=number, message=message, advice=advice)


class Halted(StoppingCriteria):
    """Ends an answer when the person asks for it."""

    def __init__(self, room: Room, number: int) -> None:
        self.room, self.number = room, number

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = self.number <= self.room.halted
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)


class Streamer(TextIteratorStreamer):
    """The text of an answer without the token that ends it; tokens that mark a tool call stay. It counts them."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__(
            answerer.tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.ends = set(answerer.stop_tokens)
        self.count = 0
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.count += 1
            if int(value.reshape(-1)[-1]) in self.ends:
                self.ended = True
                return
        super().put(value)


if __name__ == "__main__":
    sys.exit(main())
