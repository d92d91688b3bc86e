"""The rows of a stage as tokens: made once, kept in the cache, mapped from the disk.

Tokens are kept before any length limit, so that a limit can be changed without tokenising again. The key of an entry
says all that the tokens follow from: the files' content and mapping, which conversations, tokenizer, template, method.
"""

import contextlib
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.chat import BATCH, Example, Template, Tokenised, refused_length, untrainable
from core.data import Conversation
from core.data_cache import CacheUnwritable, building, data_cache, entry, key_of
from core.data_ledger import Fitting, Ledger
from core.data_limits import Lengths, Limits, over_limit
from core.data_reader import Rows
from core.errors import FinetuiError
from core.secrets import without_secrets

if TYPE_CHECKING:
    import numpy

ALONE = 4000
"""Conversations up to which tokenising here is quicker than starting processes for it."""
KEPT_FROM = 1000
"""Conversations from which on tokens are kept in the cache."""
IGNORED = -100
Step = Callable[[int, int], None]


@dataclass
class Shard:
    """A stretch of tokenised conversations: ids and labels (-100 where not trained) laid end to end."""

    ids: "numpy.ndarray"
    labels: "numpy.ndarray"
    length: "numpy.ndarray"
    first: "numpy.ndarray"
    last: "numpy.ndarray"
    trained: "numpy.ndarray"
    problem: "numpy.ndarray"
    problems: list[str]

    @cached_property
    def starts(self) -> "numpy.ndarray":
        """Where each conversation begins in `ids`, and where the last one ends."""
        import numpy

        return numpy.concatenate([[0], numpy.cumsum(self.length, dtype="i8")])


MEASURES = ("length", "first", "last", "trained", "problem")


class Growing:
    """A shard that is being filled, in memory or in files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        from array import array

        self._folder = folder
        self._flat = {name: array("i") for name in ("ids", "labels")}
        self._measures = {name: array("i") for name in MEASURES}
        self._problems = [""]
        self._files = {name: (folder / f"{name}.i32").open("wb") for name in self._flat} if folder else {}

    def add(self, found: Any) -> None:
        """Take in a Tokenised, or the error that stands for one."""
        problem = untrainable(found)
        values = (0, 0, 0, 0)
        if not problem:
            values = found.measures
            self._flat["ids"].extend(found.input_ids)
            self._flat["labels"].extend(found.labels)
        elif problem not in self._problems:
            self._problems.append(problem)
        for name, value in zip(MEASURES, (*values, self._problems.index(problem)), strict=True):
            self._measures[name].append(value)
        if self._files and len(self._flat["ids"]) > 1 << 20:
            self._flush()

    def _flush(self) -> None:
        for name, stream in self._files.items():
            stream.write(self._flat[name].tobytes())
            del self._flat[name][:]

    def close(self) -> Shard | None:
        """The shard, or None where it is in the folder now."""
        import numpy

        if self._folder is None:
            flat = {name: numpy.frombuffer(values, "i4") for name, values in self._flat.items()}
            rest = {name: numpy.frombuffer(values, "i4") for name, values in self._measures.items()}
            return Shard(**flat, **rest, problems=self._problems)
        self._flush()
        for stream in self._files.values():
            stream.close()
        for name, values in self._measures.items():
            (self._folder / f"{name}.i32").write_bytes(values.tobytes())
        (self._folder / "problems.json").write_text(json.dumps(self._problems), encoding="utf-8")
        return None


def load_shard(folder: Path) -> Shard:
    """A shard mapped from its folder. Label pages that are written to become private copies."""
    import numpy

    def column(name: str, mode: Any) -> Any:
        file = folder / f"{name}.i32"
        return numpy.memmap(file, dtype="i4", mode=mode) if file.stat().st_size else numpy.zeros(0, "i4")

    flat = {"ids": column("ids", "r"), "labels": column("labels", "c")}
    problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    return Shard(**flat, **{name: column(name, "r") for name in MEASURES}, problems=problems)


class Tokens:
    """The tokens of the conversations `which` of a ledger, in shards laid end to end."""

    def __init__(self, which: "numpy.ndarray", shards: list[Shard]) -> None:
        import numpy

        self.which, self.shards = which, shards
        self.ends = numpy.cumsum([len(shard.length) for shard in shards])
        self.problems = [""]
        numbers = []
        for shard in shards:
            new = [problem for problem in shard.problems if problem not in self.problems]
            self.problems += new
            numbers.append(numpy.array([self.problems.index(word) for word in shard.problems])[shard.problem])
        self.length, self.first, self.last, self.trained = (
            numpy.concatenate([getattr(shard, name) for shard in shards]) for name in MEASURES[:4]
        )
        self.problem = numpy.concatenate(numbers)

    def find(self, at: int) -> tuple[Shard, int]:
        """(shard, place in it) of the conversation that stands `at` in `which`."""
        import numpy

        number = int(numpy.searchsorted(self.ends, at, side="right"))
        return self.shards[number], at - (int(self.ends[number - 1]) if number else 0)

    def tokens(self, at: int, over: int = 0) -> tuple["numpy.ndarray", "numpy.ndarray"]:
        """(ids, labels) of a conversation without its first `over` tokens."""
        shard, place = self.find(at)
        start, end = int(shard.starts[place]) + over, int(shard.starts[place + 1])
        return shard.ids[start:end], shard.labels[start:end]

    def lengths(self) -> Lengths:
        """The measures of all that can be trained."""
        fine = self.problem == 0
        return Lengths(self.length[fine], self.first[fine], self.last[fine], self.trained[fine])

    def enter(self, ledger: Ledger, limits: Limits) -> None:
        """Write into the ledger what came of tokenising, and what the limits do.

        Raises FinetuiError for the first row over the limit where the plan says to refuse it.
        """
        import numpy

        ledger.tokens[self.which] = numpy.where(self.problem == 0, self.length, -1)
        for number, problem in enumerate(self.problems[1:], 1):
            mask = numpy.zeros(len(ledger.fate), bool)
            mask[self.which[self.problem == number]] = True
            ledger.leave_out(mask, problem)
        fine = numpy.flatnonzero((self.problem == 0) & (ledger.fate[self.which] != 2))
        over, lost = over_limit(limits, self.length[fine], self.first[fine], self.last[fine])
        if limits.too_long == "refuse" and over.any():
            first = fine[numpy.flatnonzero(over)[0]]
            raise refused_length(*ledger.where(int(self.which[first])), int(self.length[first]), limits)
        after = self.trained[fine].copy()
        for place in numpy.flatnonzero((over > 0) & ~lost):
            _, labels = self.tokens(int(fine[place]), int(over[place]))
            after[place] = numpy.count_nonzero(labels[1:] != IGNORED)
        ledger.limit(Fitting(self.which[fine], over, self.trained[fine], after, lost), limits.too_long)


# --- where the tokens come from ---


def fingerprint(template: Template) -> str:
    """A hash of what decides how a conversation becomes tokens: tokenizer, template, what was found out about it."""
    tokenizer = template.tokenizer
    parts = [
        tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), template.renders_tool_calls,
        template.takes_system, str(tokenizer.special_tokens_map), tokenizer.eos_token_id,
    ]  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def tokens_key(ledger: Ledger, which: "numpy.ndarray", template: Template) -> str:
    files = [[source.survey.content, source.survey.kind, source.survey.mapping] for source in ledger.sources]
    return key_of("tokens", files, which.astype("i8").tobytes(), fingerprint(template), ledger.method)


def tokenize(ledger: Ledger, template: Template, step: Step | None = None) -> Tokens:
    """The tokens of all conversations that the ledger has not left out: from the cache, or made now.

    Many are made in processes of their own, side by side, and kept. `step` is told how many of how many are done.
    """
    which = ledger.used
    key = tokens_key(ledger, which, template) if len(which) >= KEPT_FROM else ""
    folder = entry(key) if key else None
    if folder is None and key:
        with contextlib.suppress(CacheUnwritable):  # then they stay in memory
            with building(key) as fresh:
                _make(ledger, which, template, fresh, step)
            folder = data_cache() / key
    if folder:
        return Tokens(which, [load_shard(part) for part in sorted(folder.iterdir())])
    growing = Growing()
    fill(growing, ledger, which, template, step)
    shard = growing.close()
    assert shard is not None
    return Tokens(which, [shard])


def fill(growing: Growing, ledger: Ledger, which: Any, template: Template, step: Step | None) -> None:
    """Tokenise conversations here, one batch after the other."""
    rows = Rows(ledger)
    for start in range(0, len(which), BATCH):
        if step:
            step(start, len(which))
        batch: list[Conversation] = list(rows.each(which[start : start + BATCH]))
        asked = [(row.messages, row.tools) for row in batch]
        for found in template.tokenize_many(asked, only_last=ledger.method == "kto"):
            growing.add(found)
    rows.close()


def _make(ledger: Ledger, which: "numpy.ndarray", template: Template, folder: Path, step: Step | None) -> None:
    if len(which) > ALONE:
        try:
            job = pickle.dumps((ledger, which, template))
        except Exception:  # a tokenizer whose class came with the model
            job = b""
        if job:
            _make_in_children(job, folder, step, len(which))
            return
    part = folder / "0000"
    part.mkdir()
    growing = Growing(part)
    fill(growing, ledger, which, template, step)
    growing.close()


def _make_in_children(job: bytes, folder: Path, step: Step | None, count: int) -> None:
    """Let ``core.train_tokens`` tokenise side by side; it ends when this process does."""
    from core.children import CHILD_ENV

    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "core.train_tokens", str(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, cwd=tempfile.gettempdir(), env={**CHILD_ENV, **without_secrets()},
        )  # fmt: skip
        try:
            assert child.stdin and child.stdout
            child.stdin.write(len(job).to_bytes(8, "little") + job)
            child.stdin.flush()
            for line in child.stdout:
                if step and line.strip().isdigit():
                    step(int(line), count)
            if child.wait():
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
                words = said[-1][:300] if said else "It said nothing; perhaps memory ran out."
                raise FinetuiError("A process that tokenises the rows died.", words, exit_code=1)
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    pipe.close()


# --- examples ---


class Examples(Sequence[Example]):
    """Training examples of a ledger, in order, read when they are asked for; some may stand more than once."""

    def __init__(self, ledger: Ledger, tokens: Tokens, which: "numpy.ndarray") -> None:
        """`which` are numbers of conversations in the ledger, all of them tokenised and used."""
        import numpy

        self.ledger, self._tokens, self.which = ledger, tokens, which
        self.places = numpy.searchsorted(tokens.which, which)
        self.over = ledger.cut[which]
        self._rows = Rows(ledger)
        for place, over in zip(self.places[self.over > 0], self.over[self.over > 0], strict=True):
            tokens.tokens(int(place), int(over))[1][0] = IGNORED  # the first place is never a target

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        ids, labels = self._tokens.tokens(int(self.places[at]), int(self.over[at]))
        trained = (labels != IGNORED).tolist()
        return Example(self._rows[int(self.which[at])], Tokenised(ids.tolist(), trained))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    @property
    def shards(self) -> list[Shard]:
        """The tokens themselves; `places` says where in them each example stands."""
        return self._tokens.shards

    @property
    def lengths(self) -> "numpy.ndarray":
        """Tokens of each example."""
        return self._tokens.length[self.places] - self.over

    @property
    def trained(self) -> "numpy.ndarray":
        """Trained tokens of each example."""
        return self.ledger.trained[self.which]

    @property
    def labels(self) -> "numpy.ndarray":
        """Whether each example is labelled good; one without a label is not."""
        return self.ledger.labels[self.which] == 1

    @property
    def undesirable(self) -> "numpy.ndarray":
        """Whether each example is labelled bad."""
        return self.ledger.labels[self.which] == 0

    @property
    def prompt_keys(self) -> "numpy.ndarray":
        """Hashes of the prompts, unsigned and of 64 bits: as a list of mixed numbers they would be rounded."""
        return self.ledger.prompt_keys[self.which]
