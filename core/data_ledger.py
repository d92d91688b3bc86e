"""The ledger of a stage: for every row of its files whether it is used, cut or left out, and why.

It is laid over the surveys of the files in steps: what cannot be read, what the method does not take, what is held out,
what the tokenizer made of the rest, what the length limits do. The rows used, cut and left out add up to the files.
"""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from core.data_limits import TOO_LONG
from core.data_rows import label_reason
from core.data_survey import Survey
from core.paths import writing_whole

if TYPE_CHECKING:
    import numpy

USED, CUT, LEFT_OUT = 0, 1, 2
LEDGER = "ledger.jsonl"
"""The name of the ledger in a stage's folder."""
FATES = ("used", "cut", "left out")
DUPLICATE = "the same row stands before it"
BEYOND = "not among the first rows that were asked for (max_rows)"
NOT_DRAWN = "not drawn: the weight of its file is below 1"
FIELDS = ("file", "line", "fate", "reason", "split", "examples", "times", "tokens", "trained", "cut", "answer_cut",
          "repaired")  # fmt: skip


@dataclass
class Source:
    """A file of a stage, and how often an epoch shows its rows."""

    survey: Survey
    weight: float = 1.0


@dataclass
class Ledger:
    """The fates of all conversations of a stage's files, laid end to end; arrays have an entry for each of them.

    `tokens` is the length before any cut (-1 where it was not tokenised), `trained` the trained tokens that are left,
    `cut` the tokens cut from the left, `answer_cut` how many of those were trained ones, `times` how often an epoch
    shows the conversation.
    """

    sources: list[Source]
    method: str
    fate: "numpy.ndarray"
    reason: "numpy.ndarray"
    held_out: "numpy.ndarray"
    times: "numpy.ndarray"
    tokens: "numpy.ndarray"
    trained: "numpy.ndarray"
    cut: "numpy.ndarray"
    answer_cut: "numpy.ndarray"
    reasons: list[str] = field(default_factory=lambda: [""])

    @classmethod
    def of(
        cls, sources: list[Source], method: str, *, include_undesirable: bool = False, max_rows: int | None = None,
        drop_duplicates: bool = False,
    ) -> "Ledger":  # fmt: skip
        """The ledger as far as it goes without a tokenizer: labels, duplicates, the first rows asked for."""
        import numpy

        count = sum(source.survey.conversations for source in sources)
        ledger = cls(
            sources, method, fate=numpy.zeros(count, "u1"), reason=numpy.zeros(count, "u2"),
            held_out=numpy.zeros(count, "?"), times=numpy.ones(count, "u2"), tokens=numpy.full(count, -1, "i4"),
            trained=numpy.zeros(count, "i4"), cut=numpy.zeros(count, "i4"), answer_cut=numpy.zeros(count, "i4"),
        )  # fmt: skip
        plain = ledger.each("pattern", lambda survey, values: values == number_of(survey.patterns, "x"))
        labels = ledger.labels
        for label, code in ((None, -1), (False, 0), (True, 1)):
            for is_plain in (False, True):
                why = label_reason(method, label, is_plain, include_undesirable)
                ledger.leave_out((labels == code) & (plain == is_plain), why)
        if drop_duplicates:
            ledger.leave_out(ledger._repeated(), DUPLICATE)
        if max_rows:
            ledger._first(max_rows)
        return ledger

    # --- columns of all files, laid end to end ---

    def each(self, name: str, change: Any = None) -> "numpy.ndarray":
        """A column of the surveys, laid end to end; `change(survey, values)` may make another of each."""
        import numpy

        parts = [change(s.survey, s.survey[name]) if change else s.survey[name] for s in self.sources]
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts)

    @property
    def labels(self) -> "numpy.ndarray":
        """1 good, 0 bad, -1 without a label."""
        return self.each("label")

    @property
    def prompt_keys(self) -> "numpy.ndarray":
        return self.each("prompt_key")

    @property
    def file_of(self) -> "numpy.ndarray":
        """The number of the file that each conversation comes from."""
        import numpy

        return numpy.repeat(numpy.arange(len(self.sources)), [s.survey.conversations for s in self.sources])

    def place(self, conversation: int) -> tuple[int, int]:
        """(number of the file, conversation in it)."""
        for number, source in enumerate(self.sources):
            if conversation < source.survey.conversations:
                return number, conversation
            conversation -= source.survey.conversations
        raise IndexError(conversation)

    def where(self, conversation: int) -> tuple[str, int]:
        """(file, line)."""
        number, at = self.place(conversation)
        survey = self.sources[number].survey
        return survey.file, survey.line_of(at)

    # --- steps ---

    def number(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def leave_out(self, which: "numpy.ndarray", reason: str) -> None:
        """Leave out the conversations of a mask that are not left out already."""
        if reason and len(which):
            fresh = which & (self.fate != LEFT_OUT)
            if fresh.any():
                self.reason[fresh] = self.number(reason)
                self.fate[fresh] = LEFT_OUT
                self.held_out[fresh] = False

    def hold_out(self, share: float, seed: int) -> None:
        """Hold out a share of the prompts among what is used so far."""
        used = self.used
        self.held_out[used] = held_prompts(self.prompt_keys[used], self.labels[used], share, seed)

    def weigh(self, seed: int) -> None:
        """Show the training rows of each file as often as its weight says: what is drawn is drawn by `seed`."""
        import numpy

        start = 0
        for source in self.sources:
            count = source.survey.conversations
            if source.weight != 1:
                here = numpy.zeros(len(self.fate), bool)
                here[start : start + count] = True
                mine = numpy.flatnonzero(here & (self.fate != LEFT_OUT) & ~self.held_out)
                whole, part = divmod(source.weight, 1)
                chance = random.Random(f"{seed}-{source.survey.content}")
                drawn = chance.sample(range(len(mine)), round(part * len(mine)))
                self.times[mine] = int(whole)
                self.times[mine[drawn]] += 1
                nothing = numpy.zeros(len(self.fate), bool)
                nothing[mine[self.times[mine] == 0]] = True
                self.leave_out(nothing, NOT_DRAWN)
            start += count

    def limit(self, fitting: "Fitting", too_long: str) -> None:
        """Lay the length limits over the rows that have tokens: drop what is over them, or cut it."""
        hopeless = fitting.over > 0 if too_long == "drop" else fitting.lost
        which = self._of(fitting.which, hopeless)
        self.leave_out(which, TOO_LONG)
        keep = ~hopeless
        self.cut[fitting.which[keep]] = fitting.over[keep]
        self.answer_cut[fitting.which[keep]] = fitting.trained_before[keep] - fitting.trained_after[keep]
        self.trained[fitting.which[keep]] = fitting.trained_after[keep]
        self.fate[fitting.which[keep & (fitting.over > 0)]] = CUT

    def _of(self, which: "numpy.ndarray", mask: "numpy.ndarray") -> "numpy.ndarray":
        import numpy

        found = numpy.zeros(len(self.fate), bool)
        found[which[mask]] = True
        return found

    def _repeated(self) -> "numpy.ndarray":
        """Conversations that stand word for word and with the same label before, among those used so far."""
        import numpy

        keys = self.each("row_key") ^ (self.labels.astype("i8").view("u8") * numpy.uint64(0x9E3779B97F4A7C15))
        used = self.used
        _, first = numpy.unique(keys[used], return_index=True)
        repeated = numpy.zeros(len(self.fate), bool)
        repeated[used] = True
        repeated[used[first]] = False
        return repeated

    def _first(self, rows: int) -> None:
        import numpy

        used = self.used
        if len(used) <= rows:
            return
        last = used[rows - 1]
        row = self.each("row")
        mates = numpy.arange(len(self.fate)) > last  # the other half of a pair comes along
        mates &= ~((row == row[last]) & (self.file_of == self.file_of[last]))
        self.leave_out(mates, BEYOND)

    # --- what came of it ---

    @property
    def used(self) -> "numpy.ndarray":
        """Numbers of the conversations that are used or cut, in order."""
        import numpy

        return numpy.flatnonzero(self.fate != LEFT_OUT)

    def training(self) -> "numpy.ndarray":
        """Numbers of the conversations of an epoch, each as often as it is shown."""
        import numpy

        mine = numpy.flatnonzero((self.fate != LEFT_OUT) & ~self.held_out)
        return mine if (self.times[mine] == 1).all() else numpy.repeat(mine, self.times[mine])

    def evaluation(self) -> "numpy.ndarray":
        """Numbers of the conversations held out."""
        import numpy

        return numpy.flatnonzero((self.fate != LEFT_OUT) & self.held_out)

    def rows(self) -> "tuple[numpy.ndarray, list[str]]":
        """(for every row of every file FATE * 65536 + number of its reason, the words of the reasons)."""
        import numpy

        words = list(self.reasons)
        parts, start = [], 0
        for source in self.sources:
            survey = source.survey
            end = start + survey.conversations
            row, fate, reason = survey["row"], self.fate[start:end], self.reason[start:end].astype("u4")
            kept = numpy.bincount(row, fate != LEFT_OUT, minlength=survey.total) > 0
            cut = numpy.bincount(row, fate == CUT, minlength=survey.total) > 0
            why = numpy.zeros(survey.total, "u4")
            why[row[::-1]] = reason[::-1]  # of several the first conversation's
            unreadable = survey["reason"] > 0
            numbers = numpy.array([0, *(number for number in _numbers(words, survey.reasons[1:]))], "u4")
            why[unreadable] = numbers[survey["reason"][unreadable]]
            parts.append(numpy.where(kept, numpy.where(cut, CUT, USED) << 16, (LEFT_OUT << 16) + why))
            start = end
        return (numpy.concatenate(parts) if parts else numpy.zeros(0, "u4")), words

    def totals(self) -> dict[str, Any]:
        """Rows by fate, reasons of those left out and repairs, most frequent first; `held_out` are used or cut too."""
        import numpy

        rows, words = self.rows()
        values, counts = numpy.unique(rows, return_counts=True)
        fates: Counter[int] = Counter()
        reasons: Counter[str] = Counter()
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            fates[value >> 16] += count
            if value >> 16 == LEFT_OUT:
                reasons[words[value & 0xFFFF]] += count
        repaired = sum((source.survey.repair_counts() for source in self.sources), Counter())
        return {
            "rows": len(rows), "used": fates[USED], "cut": fates[CUT], "left_out": fates[LEFT_OUT],
            "held_out": self._held_out_rows(), "repaired": sum(repaired.values()),
            "reasons": dict(reasons.most_common()), "repairs": dict(repaired.most_common()),
        }  # fmt: skip

    def _held_out_rows(self) -> int:
        """Rows that are held out. The conversations of a pair have one prompt, and so are held out together."""
        import numpy

        held = self.evaluation()
        row, file = self.each("row")[held], self.file_of[held]
        return int(((numpy.diff(row) != 0) | (numpy.diff(file) != 0)).sum()) + bool(len(held))

    def label_counts(self, *, held_out: bool = False) -> Counter[bool | None]:
        """Conversations of an epoch by label; with `held_out` of all that are used, each once."""
        import numpy

        mine = self.used if held_out else self.training()
        counts = numpy.bincount(self.labels[mine].astype(int) + 1, minlength=3).tolist()
        return Counter({label: count for label, count in zip((None, False, True), counts, strict=True) if count})

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every row, in the order of the files; what is usual (one example, once, nothing cut) is left unsaid."""
        rows, words = self.rows()
        row_start = start = 0
        for number, source in enumerate(self.sources):
            survey = source.survey
            by_row = survey["row"].tolist()
            at = 0
            lines, repairs = survey["line"].tolist(), survey["repair"].tolist()
            for index, (line, repair) in enumerate(zip(lines, repairs, strict=True)):
                entry: dict[str, Any] = {"file": number, "line": line}
                value = int(rows[row_start + index])
                entry["fate"] = FATES[value >> 16]
                if value & 0xFFFF:
                    entry["reason"] = words[value & 0xFFFF]
                first = at
                while at < len(by_row) and by_row[at] == index:
                    at += 1
                if at > first:
                    self._describe(entry, range(start + first, start + at))
                if repair:
                    entry["repaired"] = survey.repairs[repair]
                yield entry
            row_start, start = row_start + survey.total, start + survey.conversations

    def _describe(self, entry: dict[str, Any], mine: range) -> None:
        """Add tokens, cuts and split of a row's conversations; of a pair the sums of those that are used."""
        kept = [at for at in mine if self.fate[at] != LEFT_OUT]
        if kept and len(kept) < len(mine):
            entry["reason"] = self.reasons[self.reason[next(at for at in mine if at not in kept)]]
        if len(kept) > 1 or (kept and len(mine) > 1):
            entry["examples"] = len(kept)
        for name in ("tokens", "trained", "cut", "answer_cut"):
            values = getattr(self, name)
            total = sum(int(values[at]) for at in (kept or mine))
            if total > 0:
                entry[name] = total
        if kept and self.held_out[kept[0]]:
            entry["split"] = "held out"
        if kept and self.times[kept[0]] != 1:
            entry["times"] = int(self.times[kept[0]])

    def save(self, path: Path) -> None:
        """Write the ledger as JSON lines: a head with files and totals, then every row."""
        encode = msgspec.json.Encoder().encode
        head = {"ledger": 1, "stage": self.method, "files": [s.survey.file for s in self.sources],
                "totals": self.totals()}  # fmt: skip
        with writing_whole(path, "wb") as stream:
            stream.write(encode(head) + b"\n")
            for entry in self.entries():
                stream.write(encode(entry) + b"\n")


def _numbers(words: list[str], more: list[str]) -> Iterator[int]:
    """The number of each of `more` among `words`, to which new ones are added."""
    known = {word: number for number, word in enumerate(words)}
    for word in more:
        if word not in known:
            known[word] = len(words)
            words.append(word)
        yield known[word]


def number_of(words: list[str], word: str) -> int:
    """The number of a word; -1 where it does not occur."""
    return words.index(word) if word in words else -1


@dataclass(frozen=True)
class Fitting:
    """What length limits do to the conversations `which`: `over` tokens go from the left; `lost` has no answer left."""

    which: "numpy.ndarray"
    over: "numpy.ndarray"
    trained_before: "numpy.ndarray"
    trained_after: "numpy.ndarray"
    lost: "numpy.ndarray"


# --- held-out prompts ---


def held_prompts(keys: "numpy.ndarray", labels: "numpy.ndarray", share: float, seed: int) -> "numpy.ndarray":
    """Which conversations are held out: a mask over `keys` (of their prompts) and `labels` (1, 0, -1 for none).

    No prompt stands on both sides. Prompts are grouped by which labels they carry and `share` of each group is held
    out: those that `core.data.drawn` puts first. So SFT and KTO hold out nearly the same prompts of one file, though
    each leaves out rows of its own. At least one prompt stays on each side when `share` > 0 and there are two.
    """
    import numpy

    if share <= 0 or not len(keys):
        return numpy.zeros(len(keys), bool)
    prompts, prompt = numpy.unique(keys, return_inverse=True)
    marks = numpy.zeros(len(prompts), "u1")
    for label, bit in ((0, 1), (-1, 2), (1, 4)):
        marks[prompt[labels == label]] |= bit
    order = numpy.argsort(_drawn(prompts, seed), kind="stable")
    held = numpy.zeros(len(prompts), bool)
    for bits in set(marks.tolist()):
        members = order[marks[order] == bits]
        held[members[: round(share * len(members))]] = True
    if not held.any() and len(prompts) > 1:
        held[order[0]] = True
    return held[prompt]


def _drawn(keys: "numpy.ndarray", seed: int) -> "numpy.ndarray":
    """`core.data.drawn` of an array of keys."""
    import numpy

    mixed = keys.astype("u8") ^ numpy.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


# --- ledgers on disk ---


def read_ledger(path: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """(head, entries with their files named) of a ledger written by `Ledger.save`. Raises OSError, ValueError."""
    stream = path.open("rb")
    head = msgspec.json.decode(stream.readline())
    return head, _named(stream, head["files"])


def _named(stream: IO[bytes], files: list[str]) -> Iterator[dict[str, Any]]:
    decode = msgspec.json.Decoder().decode
    with stream:
        for line in stream:
            entry = decode(line)
            yield {**entry, "file": files[entry["file"]]}


def save_ledger(ledger: Ledger, out: Path) -> None:
    """Every row of a ledger, its file named, as CSV or JSON lines by the ending of `out`. Raises FinetuiError."""
    files = [source.survey.file for source in ledger.sources]
    write_entries(({**entry, "file": files[entry["file"]]} for entry in ledger.entries()), out)


def write_entries(entries: Iterable[dict[str, Any]], out: Path, fields: Sequence[str] = FIELDS) -> None:
    """Entries as CSV, every one of `fields` a column, or as JSON lines."""
    with writing_whole(out) as stream:
        if out.suffix.lower() == ".csv":
            writer = csv.DictWriter(stream, fields, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(entries)
            return
        for entry in entries:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
