"""llama.cpp through cyllama: quantise a GGUF file, load one, cut text into tokens, and let it speak.

cyllama lies in a folder of its own (`core.gguf_tools`), which is put at the end of the path here.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from core.errors import FinetuiError
from core.gguf_tools import need_tools

FILE_TYPES = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17}
"""``llama_ftype`` of llama.h."""
BATCH = 512


def library() -> Any:
    """The module with llama.cpp's calls. Raises FinetuiError when it is not installed."""
    folder = str(need_tools())
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: its copy of `gguf` must not shadow ours
    import cyllama.llama.llama_cpp as llama

    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else an abort starts a debugger where there is one
    llama.disable_logging()
    return llama


def quantise(source: Path, target: Path, quantisation: str, threads: int) -> None:
    """Write `target` from the F16 file `source` with llama.cpp's own mixture of formats. Raises FinetuiError."""
    llama = library()
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = FILE_TYPES[quantisation], threads
    try:
        llama.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        raise FinetuiError(
            f"llama.cpp could not make {quantisation}: {error}.", "See train.log.", exit_code=1
        ) from error


class Llama:
    """A GGUF file loaded by llama.cpp on the CPU."""

    def __init__(self, llama: Any, model: Any, context: Any) -> None:
        self._llama, self._model, self._context = llama, model, context
        self.vocabulary = model.get_vocab()
        self.size: int = self.vocabulary.n_vocab

    def tokens(self, text: str) -> list[int]:
        """`text` as token ids, special tokens recognised, none added."""
        return list(self.vocabulary.tokenize(text, False, True))

    def forced(self, ids: list[int], answer: list[int]) -> torch.Tensor:
        """Logits before each token of `answer`, given all before it: shape (tokens, vocabulary), float32."""
        everything, first = [*ids, *answer[:-1]], len(ids) - 1
        rows = []
        self._context.kv_cache_clear(True)
        for start in range(0, len(everything), BATCH):
            part = everything[start : start + BATCH]
            wanted = [start + offset >= first for offset in range(len(part))]
            self._decode(part, start, wanted)
            rows += [self._logits(offset) for offset, want in enumerate(wanted) if want]
        return torch.stack(rows) if answer else torch.empty(0, self.size)

    def greedy(self, ids: list[int], limit: int) -> list[int]:
        """The greedy answer, its end token included; at most `limit` tokens."""
        self._context.kv_cache_clear(True)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self._decode(part, start, [start + offset == len(ids) - 1 for offset in range(len(part))])
        answer = [int(self._logits(len(part) - 1).argmax())]
        while len(answer) < limit and not self.vocabulary.is_eog(answer[-1]):
            self._decode([answer[-1]], len(ids) + len(answer) - 1, [True])
            answer.append(int(self._logits(0).argmax()))
        return answer

    def _decode(self, ids: list[int], start: int, wanted: list[bool]) -> None:
        batch = self._llama.LlamaBatch(n_tokens=max(len(ids), 1), embd=0, n_seq_max=1)
        for offset, (token, want) in enumerate(zip(ids, wanted, strict=True)):
            batch.add(token, start + offset, [0], want)
        try:
            self._context.decode(batch)
        finally:
            batch.close()

    def _logits(self, index: int) -> torch.Tensor:
        return torch.tensor(self._context.get_logits_ith(index), dtype=torch.float32)


def _loaded(llama: Any, path: Path) -> Any:
    """The file mapped into memory. Raises FinetuiError."""
    settings = llama.LlamaModelParams()  # vocab_only would be enough for tokens, but makes cyllama 0.2.18 abort
    settings.n_gpu_layers = 0
    try:
        return _counting(llama)(str(path), settings)
    except Exception as error:  # what the binding raises has no type of its own
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> FinetuiError:
    return FinetuiError(f"llama.cpp cannot load {path.name}: {error}.", "See train.log.", exit_code=1)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Llama]:
    """`path` mapped into memory, to cut text into tokens. Raises FinetuiError when llama.cpp refuses it."""
    llama = library()
    model = _loaded(llama, path)
    try:
        yield Llama(llama, model, None)
    finally:
        model.close()


@contextlib.contextmanager
def speaking(path: Path, longest: int) -> Iterator[Llama]:
    """`path` loaded, with room for `longest` tokens. Raises FinetuiError when llama.cpp refuses it."""
    llama = library()
    model = context = None
    try:
        model = _loaded(llama, path)
        try:
            room = llama.LlamaContextParams()
            room.n_ctx, room.n_batch = max(longest, 64), BATCH
            room.n_threads = room.n_threads_batch = threads()
            context = llama.LlamaContext(model, room)
        except Exception as error:  # what the binding raises has no type of its own
            raise _refusal(path, error) from error
        yield Llama(llama, model, context)
    finally:
        for thing in (context, model):
            if thing is not None:
                thing.close()


def _counting(llama: Any) -> type:
    """cyllama 0.2.18 asks its model for ``n_vocab``, which it does not have, when it hands out logits."""

    class Model(llama.LlamaModel):
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    return Model


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
