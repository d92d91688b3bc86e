"""The demo's own data: short tool-calling conversations over ten tools, generated from a seed.

Held-out and tuning rows share the tools with training but no sentence; half of them use phrasings that no training
row has (the tuning file's differ from the held-out file's), and many of their names, cities and numbers are new too.
KTO rows hold good answers and answers that fail the way small models fail; most of their prompts are phrased as no
SFT row and no scored row is. Run it: `python -P -m core.demo FOLDER`.
"""

from __future__ import annotations

import json
import random
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from core.demo_tools import FEEDBACK_VALUES, NUMBERS, TOOLS, VALUES, Tool
from core.errors import FinetuiError
from core.paths import writing_whole

SYSTEM_PROMPT = "You call tools."
SFT_BLOCKS, SCORED_BLOCKS, KTO_BLOCKS = 48, 16, 24  # a block is one row of each tool
KTO_BLOCKS_FROM_SFT = 4  # every fourth block of KTO prompts repeats sentences of the SFT file
KTO_FEEDBACK = 0.75  # share of the other KTO prompts' phrasings, and of their values, that no SFT row has
NEW_VALUES = {slot: new for slot, (_, new) in VALUES.items()}
# Mostly near misses. A model after SFT makes no faults of form; pushing many of them down spoiled good answers.
FAULTS = {
    "wrong_tool": 32,
    "wrong_argument": 120,
    "missing_argument": 2,
    "invented_argument": 2,
    "broken_json": 2,
    "chatter": 2,
}
COPIED = ("title", "person", "news", "note", "city", "query", "artist", "room", "place")
FREE_TEXT = ("{news}", "{note}", "{query}")  # a greeting may stand before these, nothing after them
GREETINGS = ("Hey, ", "Hi, ", "OK, ", "Hello, ", "Well, ", "Now, ", "Next, ")
CLOSINGS = (", please", ", thanks", ".", ".", "!")
CHATTER = (
    "Sure, I can help you with that!",
    "I am sorry, but I cannot do that.",
    "Of course! What else would you like to know?",
    "Done! Is there anything else I can do for you?",
)

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class DemoFiles:
    """The files of the demo and how many rows (or tools) each holds, by file name."""

    sft: Path
    kto: Path
    heldout: Path
    tuning: Path
    tools: Path
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A sentence, the tool it asks for, its arguments, and the slots they came from."""

    tool: Tool
    sentence: str
    slots: dict[str, str]
    arguments: Row

    @property
    def answer(self) -> str:
        return call_text(self.tool.name, self.arguments)


def call_text(name: str, arguments: Row) -> str:
    """The text form of a tool call: a name line and an arguments line of JSON."""
    return f"tool_call: {name}\narguments: {json.dumps(arguments)}"


def write_demo_data(folder: Path, seed: int = 7) -> DemoFiles:
    """Write sft, kto, heldout and tuning (.jsonl) and tools.json into `folder`; the same seed gives the same bytes.

    480 SFT, 320 KTO (half of each label), 160 held-out and 160 tuning rows. Any ten rows in sequence from a multiple
    of ten cover the ten tools, so a prefix is as balanced as the whole. Raises FinetuiError when the disk refuses.
    """
    writer = Writer(random.Random(seed))
    heldout = list(writer.scored(0))
    tuning = list(writer.scored(1))
    sft = [writer.known(tool) for _ in range(SFT_BLOCKS) for tool in writer.shuffled(TOOLS)]
    kto = writer.kto(sft)
    rows = {
        "sft": [_row(example.sentence, example.answer) for example in sft],
        "kto": kto,
        "heldout": heldout,
        "tuning": tuning,
    }
    for name, content in rows.items():
        with writing_whole(folder / f"{name}.jsonl") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    with writing_whole(folder / "tools.json") as stream:
        stream.write(json.dumps([tool.schema() for tool in TOOLS], indent=2) + "\n")
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    counts = {path.name: len(rows[name]) for name, path in paths.items()} | {"tools.json": len(TOOLS)}
    return DemoFiles(**paths, tools=folder / "tools.json", counts=counts)


def _row(sentence: str, answer: str, **extra: Any) -> Row:
    turns = (("system", SYSTEM_PROMPT), ("user", sentence), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns], **extra}


class Writer:
    """Draws examples from one stream of random numbers and never the same sentence twice.

    Only `random()` of the generator is used: its values are the same in every version of Python, those of `choice`
    and `shuffle` are not promised to be.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self._rng.random() * len(values))]

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def shuffled(self, values: Sequence[T]) -> list[T]:
        keyed = [(self._rng.random(), position) for position in range(len(values))]
        return [values[position] for _, position in sorted(keyed)]

    # Sentences ---------------------------------------------------------------------------------------------------

    def known(self, tool: Tool) -> Example:
        """An example of the training kind."""
        return self._example(tool, tool.phrasings, NEW_VALUES, 0.0)

    def feedback(self, tool: Tool) -> Example:
        """An example of the KTO kind."""
        phrasings = tool.feedback if self.chance(KTO_FEEDBACK) else tool.phrasings
        return self._example(tool, phrasings, FEEDBACK_VALUES, KTO_FEEDBACK)

    def scored(self, file: int) -> Iterator[Row]:
        """Rows for scoring; `file` 0 or 1 chooses the half of the new phrasings. Each tool alternates known and new."""
        for block in range(SCORED_BLOCKS):
            for tool in self.shuffled(TOOLS):
                new = (block + TOOLS.index(tool)) % 2 == 1
                phrasings = tool.new[file::2] if new else tool.phrasings
                example = self._example(tool, phrasings, NEW_VALUES, 0.5)
                yield _row(example.sentence, example.answer, phrasing="new" if new else "known")

    def _example(
        self, tool: Tool, phrasings: Sequence[str], others: Mapping[str, Sequence[str]], share: float
    ) -> Example:
        """An example with a `share` of its values from `others`.

        Draws until the sentence, without greeting and closing, is one that no file has.
        """
        for _ in range(10_000):
            fixed, phrasing = _parse(self.pick(phrasings))
            slots = self._fill(phrasing, others, share) | fixed
            shown = {name: value.partition("=")[0] for name, value in slots.items()}
            meant = {name: value.rpartition("=")[2] for name, value in slots.items()}
            sentence = phrasing.format(**shown)
            key = re.sub(r"\W+", " ", sentence).strip().casefold()
            if key not in self._used:
                self._used.add(key)
                arguments = {name: _argument(slot, meant[slot]) for name, slot in tool.slots.items()}
                return Example(tool, self._dress(sentence, phrasing), meant, arguments)
        raise FinetuiError(f"The demo has no unused sentence left for {tool.name}.", "Ask for fewer rows.")

    def _fill(self, phrasing: str, others: Mapping[str, Sequence[str]], share: float) -> dict[str, str]:
        names = [name for _, name, _, _ in string.Formatter().parse(phrasing) if name]
        slots = {name: self._value(name, others, share) for name in names if name in VALUES}
        if "source" in names:
            slots["source"], slots["target"] = self._value("units", others, share).split(" to ")
        return slots

    def _value(self, slot: str, others: Mapping[str, Sequence[str]], share: float) -> str:
        other = others.get(slot)
        return self.pick(other if other and self.chance(share) else VALUES[slot][0])

    def _dress(self, sentence: str, phrasing: str) -> str:
        """Add what people put around a request: a greeting, a capital, a closing."""
        if not phrasing.endswith(FREE_TEXT) and self.chance(0.4):
            closing = self.pick(CLOSINGS)
            if not sentence.endswith("?"):
                sentence += closing
            elif closing.startswith(","):
                sentence = f"{sentence[:-1]}{closing}?"
        if self.chance(0.25):
            return self.pick(GREETINGS) + sentence
        return sentence[0].upper() + sentence[1:] if self.chance(0.6) else sentence

    # KTO ---------------------------------------------------------------------------------------------------------

    def kto(self, sft: Sequence[Example]) -> list[Row]:
        """Good and bad answers in turn. A third of the prompts have one of each, 160 rows apart."""
        good: list[Example] = []
        bad: list[Example] = []
        for block in range(KTO_BLOCKS):
            start = block * len(TOOLS)
            repeats = block % KTO_BLOCKS_FROM_SFT == 0
            examples = sft[start : start + len(TOOLS)] if repeats else [self.feedback(t) for t in self.shuffled(TOOLS)]
            if block % 3 != 2:
                good.extend(examples)
            if block % 3 != 1:
                bad.extend(examples)
        faults = self.shuffled([fault for fault, count in FAULTS.items() for _ in range(count)])
        half = len(bad) // 2
        rows: list[Row] = []
        for liked, disliked, fault in zip(good, bad[half:] + bad[:half], faults, strict=True):
            rows.append(_row(liked.sentence, liked.answer, label=True))
            rows.append(_row(disliked.sentence, self.bad_answer(disliked, fault), label=False, fault=fault))
        return rows

    def bad_answer(self, example: Example, fault: str) -> str:
        """An answer to `example` that is wrong in the way `fault` names and right otherwise."""
        tool, arguments = example.tool, dict(example.arguments)
        match fault:
            case "wrong_tool":
                name, patterns = self.pick(tool.mistaken)
                return call_text(name, {key: _number(p.format(**example.slots)) for key, p in patterns.items()})
            case "wrong_argument":
                arguments |= self._wrong(example)
            case "missing_argument":
                del arguments[self.pick(list(arguments))]
            case "invented_argument":
                arguments[tool.invented[0]] = tool.invented[1]
            case "broken_json":
                return self._broken(example.answer)
            case "chatter":
                chatter = self.pick(CHATTER)
                return self.pick((chatter, f"{chatter}\n{example.answer}", f"{example.answer}\n{chatter}"))
        return call_text(tool.name, arguments)

    def _wrong(self, example: Example) -> Row:
        """Wrong values for an argument, or for both units: the slips a half-trained model makes when it copies."""
        name = self.pick(example.tool.weak)
        slot, value = example.tool.slots[name], example.arguments[name]
        if slot == "source" and self.chance(0.75):
            return {"from": example.arguments["to"], "to": example.arguments["from"]}
        if slot in NUMBERS and self.chance(0.5):
            return {name: value * 10 if self.chance(0.5) else value + 5}
        if slot in COPIED:
            return {name: self.pick(_slips(str(value), example.sentence))}
        pool = [part for pair in VALUES["units"][0] for part in pair.split(" to ")]
        choices = [_argument(slot, v.rpartition("=")[2]) for v in (VALUES[slot][0] if slot in VALUES else pool)]
        return {name: self.pick([choice for choice in choices if choice != value])}

    def _broken(self, answer: str) -> str:
        """The answer with its JSON spoiled: no closing brace, single quotes, or a name without quotes."""
        head, brace, body = answer.partition("{")
        return self.pick((answer[:-1], head + brace + body.replace('"', "'"), head + brace + body.replace('"', "", 2)))


def _slips(value: str, sentence: str) -> list[str]:
    """Bad copies of `value`: an article, a syllable or a word too many or too few, or what follows copied too."""
    first, *rest = value.split()
    slips = [value.removeprefix("the ") if value.startswith("the ") else f"the {value}"]
    slips += [f"{first[1:]}{value}", f"{value[0]} {value}", f"{value}{value[1]}"]
    slips += [" ".join(rest), value[: value.rindex(" ")]] if rest else [value[: len(value) // 2 + 1], f"{value[:-1]}el"]
    following = re.sub(r"[^\w ].*", "", sentence.partition(value)[2]).split()
    return slips + [f"{value} {' '.join(following[:2])}"] * 2 if following else slips


def _parse(phrasing: str) -> tuple[dict[str, str], str]:
    """Split `state=on>it is too dark …` into the fixed slot and the sentence."""
    fixed, mark, rest = phrasing.partition(">")
    if not mark:
        return {}, phrasing
    name, _, value = fixed.partition("=")
    return {name: value}, rest


def _argument(slot: str, value: str) -> str | int | float:
    return _number(value) if slot in NUMBERS else value


def _number(value: str) -> str | int | float:
    """The value as a number where it is one in digits."""
    if re.fullmatch(r"\d+", value):
        return int(value)
    return float(value) if re.fullmatch(r"\d+\.\d+", value) else value


def main(arguments: Sequence[str]) -> int:
    """Write the files into the folder named on the command line and print the counts."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -P -m core.demo FOLDER", file=sys.stderr)
        return 2
    try:
        files = write_demo_data(Path(arguments[0]))
    except FinetuiError as error:
        print(f"{error.message}\n{error.advice}", file=sys.stderr)
        return error.exit_code
    for name, count in files.counts.items():
        print(f"{count:5d}  {files.tools.parent / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
