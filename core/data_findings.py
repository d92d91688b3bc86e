"""What is worth knowing about a stage's rows before they are trained: each finding with lines to look at and a remedy.

Findings are sentences for people who may never have trained a model. The heaviest come first: what spoils the training
(``!!``), what probably should be mended (``!``), what is good to know (``·``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from core import data_facts as facts
from core.data_ledger import LEFT_OUT, Ledger
from core.data_limits import TOO_LONG
from core.data_repeats import Repeats
from core.data_survey import Survey

if TYPE_CHECKING:
    import numpy

HEAVY, MEND, KNOW = 0, 1, 2
MARKS = ("!!", "!", "·")
SHOWN = 20
MOST, MANY = 0.5, 0.2
SKEWED = 10
FEW = 20
REPAIR = "finetui data clean FILE OUT writes a copy in which it is mended."

Place = tuple[str, int]


@dataclass(frozen=True)
class Finding:
    """`places` are (file, line), at most SHOWN of them; `together` says that they come in pairs or groups."""

    kind: str
    weight: int
    count: int
    text: str
    remedy: str
    places: list[Place] = field(default_factory=list)
    detail: str = ""

    @property
    def mark(self) -> str:
        return MARKS[self.weight]

    def lines_words(self, most: int = 6) -> str:
        """The lines to look at in a few words; files are named where there is more than one."""
        if not self.places:
            return ""
        files = {file for file, _ in self.places}
        shown = [f"{line:,}" if len(files) == 1 else f"{file.rsplit('/', 1)[-1]}:{line}" for file, line in self.places]
        more = " …" if self.count > most and len(shown) >= most else ""
        return f"line{'s' * (len(shown) > 1)} {', '.join(shown[:most])}{more}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "mark": self.mark}


def glimpses(reasons: Counter[str], flags: Counter[int]) -> list[str]:
    """What has been seen so far while a file is still being read, in a few words each, most frequent first."""
    grouped: Counter[str] = Counter()
    for reason, count in reasons.items():
        grouped[f"left out: {_start_of(reason)}"] += count
    for flag, words in SEEN.items():
        grouped[words] += flags.get(flag, 0)
    return [f"{count:,} × {words}" for words, count in grouped.most_common(5) if count]


SEEN = {
    facts.MOJIBAKE: "text decoded wrongly", facts.TEMPLATED: "a chat template's marks in the text",
    facts.BLANK_ANSWER: "a blank answer", facts.BROKEN_CALL: "a tool call that is no JSON",
    facts.WRONG_CALL: "a tool call that does not fit its tool", facts.MADE_UP: "a made-up tool result",
}  # fmt: skip


@dataclass
class Look:
    """What findings are drawn from. `repeats` are near duplicates by file, `held_keys` prompts of a file of its own.

    `tokens` says whether the ledger's token columns are filled; `sampled` that only some rows were tokenised.
    """

    ledger: Ledger
    repeats: list[Repeats] = field(default_factory=list)
    max_length: int = 0
    held_file: Survey | None = None
    untuned: bool = False

    def __post_init__(self) -> None:
        self.used = self.ledger.fate != LEFT_OUT
        self.labels = self.ledger.labels
        self.flags = self.ledger.each("flags")

    def places(self, which: "numpy.ndarray", most: int = SHOWN) -> list[Place]:
        """Where the conversations of a mask or of numbers stand."""
        import numpy

        numbers = numpy.flatnonzero(which) if which.dtype == bool else which
        found = [self.ledger.where(int(number)) for number in numbers[: 2 * most]]
        return list(dict.fromkeys(found))[:most]

    def flagged(self, flag: int) -> "numpy.ndarray":
        return self.used & (self.flags & flag > 0)

    @property
    def kto(self) -> bool:
        return self.ledger.method == "kto"


def findings(look: Look) -> list[Finding]:
    """Every finding, heaviest first."""
    makers: tuple[Callable[[Look], Iterator[Finding]], ...] = (
        _plan, _unusable, _labels, _conflicts, _leaks, length_findings, _answers, _calls, _texts, _repeats, _systems,
        _turns,
    )  # fmt: skip
    found = [finding for maker in makers for finding in maker(look)]
    return sorted(found, key=lambda finding: finding.weight)


def _rows(count: int, verb: str = "") -> str:
    """``1 row holds``, ``2 rows hold``: the verb as it stands with several."""
    if count != 1:
        return f"{count:,} rows {verb}".rstrip()
    return f"1 row {SINGULAR.get(verb, f'{verb}s' if verb else '')}".rstrip()


def _many(count: int, word: str) -> str:
    """``1 answer is``, ``2 answers are``."""
    return f"{count:,} {word} is" if count == 1 else f"{count:,} {word}s are"


SINGULAR = {"are": "is", "say": "says", "have": "has", "go": "goes", "lose": "loses"}


# --- the stage as a whole ---


def _plan(look: Look) -> Iterator[Finding]:
    if look.untuned:
        yield Finding(
            "untuned base", MEND, 1, "KTO starts from a model that was not tuned for this yet.",
            "SFT→KTO usually works better; or name a tuned model: run:NAME, or an instruct model.",
        )  # fmt: skip
    count = len(look.ledger.training())
    if 0 < count < FEW:
        yield Finding(
            "few rows", MEND, count, f"Only {count} examples are trained.",
            "Some dozens teach a form, some hundreds a skill. Watch for answers learnt by heart.",
        )  # fmt: skip
    if look.kto and count:
        counts = look.ledger.label_counts()
        good, bad = counts[True], counts[False]
        if min(good, bad) and max(good, bad) > SKEWED * min(good, bad):
            rare, word = (good, "good") if good < bad else (bad, "bad")
            yield Finding(
                "skewed labels", MEND, rare, f"Only {rare:,} {word} answers stand beside {max(good, bad):,} others.",
                f"The weights make up for it, but few {word} answers teach little: add some.",
                look.places(look.used & (look.labels == (word == "good"))),
            )  # fmt: skip


# --- rows that cannot be used ---

REMEDIES = (
    ("broken JSON", REPAIR),
    ("not UTF-8", "Save the file as UTF-8; " + REPAIR),
    ("no conversation found", "Say which column is what: --column prompt=… --column completion=… (m in the wizard)."),
    ("no assistant turn", "Nothing could be learnt from it: add the answer, or let it go."),
    ("an assistant turn is empty", "Add the answer, or let the row go."),
    ("a turn has neither", "Add the answer, or let the row go."),
    ("unknown role", "Roles are system, user, assistant and tool: rename it."),
    ("the label", "Labels are true and false: mend these."),
    ("nothing stands before", "An answer needs a question before it."),
    ("the row has more cells", "A cell holds a comma and no quotation marks: quote it."),
)


def remedy_of(reason: str) -> str:
    """What to do about a reason for which rows are left out."""
    return next((remedy for start, remedy in REMEDIES if reason.startswith(start)), "Mend or delete these rows.")


def _unusable(look: Look) -> Iterator[Finding]:
    """Structural reasons; those that differ only in a word of the row's own count together."""
    import numpy

    for source in look.ledger.sources:
        survey = source.survey
        groups: dict[str, list[int]] = {}
        for number, reason in enumerate(survey.reasons):
            if number:
                groups.setdefault(_start_of(reason), []).append(number)
        counts = numpy.bincount(survey["reason"], minlength=len(survey.reasons))
        for start, numbers in groups.items():
            count = int(counts[numbers].sum())
            if not count:
                continue
            rows = numpy.flatnonzero(numpy.isin(survey["reason"], numbers))[:SHOWN]
            places = [(survey.file, int(survey["line"][row])) for row in rows]
            often = sorted(((int(counts[number]), survey.reasons[number]) for number in numbers), reverse=True)
            reason = often[0][1] if len(often) == 1 else start
            detail = "; ".join(f"{many:,} × {words}" for many, words in often[:3]) if len(often) > 1 else ""
            heavy = HEAVY if count > MOST * survey.total else MEND
            text = f"{_rows(count)} left out: {reason}."
            yield Finding("unusable", heavy, count, text, remedy_of(start), places, detail)


def _start_of(reason: str) -> str:
    for mark in (" (", " '", ' "', "'"):
        reason = reason.split(mark, 1)[0]
    return reason


# --- labels ---


def _labels(look: Look) -> Iterator[Finding]:
    import numpy

    ledger = look.ledger
    for number, reason in enumerate(ledger.reasons):
        if not number:
            continue
        mask = ledger.reason == number
        count = int(mask.sum())
        if not count:
            continue
        if reason.startswith("no label"):
            yield Finding(
                "unlabelled", MEND, count, f"{_rows(count)} without a label, beside labelled ones, left out.",
                "Label them true or false, or train them with SFT.", look.places(mask),
            )  # fmt: skip
        elif reason.startswith("label is false"):
            yield Finding(
                "bad answers", KNOW, count, f"{_many(count, 'answer')} labelled false and not learnt.",
                "That is as it should be; KTO uses them. --include-undesirable would learn them.", look.places(mask),
            )  # fmt: skip
        elif reason.startswith("plain text"):
            words = f"{_rows(count)} left out: {reason}."
            yield Finding("plain text", MEND, count, words, "Use SFT.", look.places(mask))
    for source in ledger.sources:
        survey = source.survey
        read = [number for number, words in enumerate(survey.repairs) if words.startswith("label ")]
        rows = numpy.flatnonzero(numpy.isin(survey["repair"], read)) if read else numpy.zeros(0, int)
        if len(rows):
            words = survey.repairs[int(survey["repair"][rows[0]])]
            yield Finding(
                "label types", KNOW, len(rows), f"{_many(len(rows), 'label')} no truth value ({words}).",
                "They were understood; " + REPAIR, [(survey.file, int(survey["line"][row])) for row in rows[:SHOWN]],
            )  # fmt: skip


def _conflicts(look: Look) -> Iterator[Finding]:
    """The same prompt and answer with both labels."""
    import numpy

    keys = look.ledger.each("row_key")
    both = numpy.intersect1d(keys[look.used & (look.labels == 1)], keys[look.used & (look.labels == 0)])
    if len(both):
        mask = look.used & numpy.isin(keys, both)
        order = numpy.flatnonzero(mask)
        order = order[numpy.argsort(keys[order], kind="stable")]
        yield Finding(
            "both labels", HEAVY, len(both),
            f"{_many(len(both), 'answer')} labelled true and false for the same prompt.",
            "Only one label can be right: they cancel each other out. Mend or delete one of each.", look.places(order),
        )  # fmt: skip


def _leaks(look: Look) -> Iterator[Finding]:
    """Held-out prompts that also stand in training."""
    import numpy

    ledger = look.ledger
    training = look.used & ~ledger.held_out
    if look.held_file is not None and look.held_file.conversations:
        keys = ledger.prompt_keys
        shared = training & numpy.isin(keys, look.held_file["prompt_key"])
        if count := len(numpy.unique(keys[shared])):
            yield Finding(
                "held-out in training", HEAVY, count,
                f"{count:,} prompt{'s' * (count > 1)} of the evaluation file {'stands' if count == 1 else 'stand'} in "
                "training as well.",
                "The score would measure memory: take them out of one of the two.", look.places(shared),
            )  # fmt: skip
    if ledger.held_out.any() and look.repeats:
        pairs = [pair for pair in _across(look) if pair]
        if pairs:
            places = [ledger.where(number) for pair in pairs[: SHOWN // 2] for number in pair]
            yield Finding(
                "held-out nearly in training", MEND, len(pairs),
                f"{len(pairs):,} held-out row{'s' * (len(pairs) > 1)} nearly the same as a trained one.",
                "The evaluation will look a little better than it is.", places,
            )  # fmt: skip


def _across(look: Look) -> Iterator[tuple[int, int]]:
    """(held out, trained) for every held-out conversation that is nearly a trained one."""
    start = 0
    for source, repeats in zip(look.ledger.sources, look.repeats, strict=False):
        for members in repeats.members().values():
            mine = [start + number for number in members if look.used[start + number]]
            held = [number for number in mine if look.ledger.held_out[number]]
            trained = [number for number in mine if not look.ledger.held_out[number]]
            if trained:
                yield from ((number, trained[0]) for number in held)
        start += source.survey.conversations


# --- length ---


def length_findings(look: Look) -> Iterator[Finding]:
    """What tokenising and the length limits do to the rows; none while no row was tokenised."""
    import numpy

    ledger = look.ledger
    long = ledger.reason == ledger.reasons.index(TOO_LONG) if TOO_LONG in ledger.reasons else look.used & False
    if count := int(long.sum()):
        share = count / max(int((ledger.tokens >= 0).sum()), 1)
        longest = int(ledger.tokens[long].max())
        order = numpy.flatnonzero(long)
        order = order[numpy.argsort(-ledger.tokens[order], kind="stable")]
        yield Finding(
            "too long", HEAVY if share > MOST else MEND, count,
            f"{_rows(count, 'are')} longer than {look.max_length:,} tokens and left out; the longest has {longest:,}.",
            "Raise max_length (it costs memory), or cut them from the left: too_long: cut.", look.places(order),
        )  # fmt: skip
    cut = ledger.cut > 0
    if answers := int((ledger.answer_cut > 0).sum()):
        yield Finding(
            "answers cut", MEND, answers, f"{answers:,} answers lose their beginning to the limit.",
            "Raise max_length, or leave such rows out: too_long: drop.", look.places(ledger.answer_cut > 0),
        )  # fmt: skip
    if count := int(cut.sum()):
        yield Finding(
            "cut", KNOW, count, f"{_rows(count, 'lose')} {int(ledger.cut[cut].sum()):,} tokens from the left.",
            "Their system prompt and first turns go. Raise max_length to keep them.", look.places(cut),
        )  # fmt: skip
    for number, reason in enumerate(ledger.reasons):
        if "chat template" in reason or reason.startswith("no trained token"):
            mask = ledger.reason == number
            if count := int(mask.sum()):
                yield Finding(
                    "template", MEND, count, f"{_rows(count)} left out: {reason}.",
                    "Mend the rows, or give another template: --set model.chat_template=FILE.jinja.", look.places(mask),
                )  # fmt: skip


# --- what the rows say ---


def _answers(look: Look) -> Iterator[Finding]:
    import numpy

    blank = look.flagged(facts.BLANK_ANSWER)
    if count := int(blank.sum()):
        yield Finding(
            "blank answers", MEND, count, f"{_many(count, 'answer')} blank: the model would learn to say nothing.",
            "Add the answers or delete these rows.", look.places(blank),
        )  # fmt: skip
    mine = look.used & (look.labels != 0)
    keys = look.ledger.each("answer_key")[mine]
    if len(keys) >= FEW:
        values, counts = numpy.unique(keys, return_counts=True)
        most = int(counts.max())
        if most > MANY * len(keys):
            mask = mine & (look.ledger.each("answer_key") == values[counts.argmax()])
            yield Finding(
                "same answer", HEAVY if most > MOST * len(keys) else MEND, most,
                f"{most / len(keys):.0%} of the answers are one and the same.",
                "The model would learn to say that whatever it is asked: thin these rows out.", look.places(mask),
            )  # fmt: skip


CALL_FINDINGS = (
    (facts.BROKEN_CALL, "broken calls", "tool calls whose arguments are not JSON",
     "The model would learn calls that no program can read. finetui data clean FILE OUT mends breaks, commas, quotes."),
    (facts.WRONG_CALL, "wrong calls", "tool calls that do not fit the tools given", "Mend the calls, or the schemas."),
    (facts.MADE_UP, "made-up results", "answers that make a call and then write its result themselves",
     "The model would learn to invent results: end the answer with the call, give the result as a turn of role tool."),
)  # fmt: skip


def _calls(look: Look) -> Iterator[Finding]:
    for flag, kind, words, remedy in CALL_FINDINGS:
        mask = look.flagged(flag) & (look.labels != 0)
        if count := int(mask.sum()):
            problems = [word for source in look.ledger.sources for word, _ in source.survey.problems.most_common(3)]
            detail = "; ".join(problems[:3]) if flag != facts.MADE_UP else ""
            text = f"{_rows(count, 'hold')} {words}."
            yield Finding(kind, MEND, count, text, remedy, look.places(mask), detail)


def _texts(look: Look) -> Iterator[Finding]:
    templated = look.flagged(facts.TEMPLATED)
    if count := int(templated.sum()):
        yield Finding(
            "template in text", HEAVY if count > MOST * max(int(look.used.sum()), 1) else MEND, count,
            f"{_rows(count, 'hold')} marks of a chat template in their text (<|im_start|>, [INST], ### Response …).",
            "They would be wrapped in a template twice: give the turns as messages.", look.places(templated),
        )  # fmt: skip
    if count := int((mask := look.flagged(facts.MOJIBAKE)).sum()):
        yield Finding(
            "mojibake", MEND, count, f"{_rows(count, 'hold')} text that was decoded wrongly (Ã¤ for ä, â€™ for ’).",
            "finetui data clean --mend-encoding FILE OUT puts back what can be put back.", look.places(mask),
        )  # fmt: skip


def _repeats(look: Look) -> Iterator[Finding]:
    import numpy

    ledger = look.ledger
    keys = ledger.each("row_key") ^ look.labels.astype("i8").view("u8")
    mine = numpy.flatnonzero(look.used)
    _, first, group, counts = numpy.unique(keys[mine], return_index=True, return_inverse=True, return_counts=True)
    repeated = len(mine) - len(first)
    if repeated:
        order = mine[counts[group] > 1]
        order = order[numpy.argsort(keys[order], kind="stable")]
        yield Finding(
            "duplicates", MEND if repeated > 0.01 * len(mine) else KNOW, repeated,
            f"{_rows(repeated, 'repeat')} an earlier one word for word.",
            "--duplicates drop leaves them out; finetui data clean --drop-duplicates writes a copy without them.",
            look.places(order),
        )  # fmt: skip
    near: list[list[int]] = []
    start = 0
    for source, repeats in zip(ledger.sources, look.repeats, strict=False):
        row_keys = source.survey["row_key"]
        for members in repeats.members().values():
            kept = {int(row_keys[number]): start + number for number in reversed(members) if look.used[start + number]}
            if len(kept) > 1:
                near.append(sorted(kept.values()))
        start += source.survey.conversations
    if near:
        count = sum(len(members) - 1 for members in near)
        places = [ledger.where(number) for members in near for number in members[:4]][:SHOWN]
        yield Finding(
            "near duplicates", KNOW, count, f"About {_rows(count, 'say')} almost the same as another.",
            "A few do no harm; many teach one thing at the cost of others.", places,
        )  # fmt: skip


def _systems(look: Look) -> Iterator[Finding]:
    import numpy

    systems = look.ledger.each("system")[look.used]
    if not len(systems):
        return
    values, counts = numpy.unique(systems[systems != 0], return_counts=True)
    without = int((systems == 0).sum())
    if without and len(values):
        mask = look.used & (look.ledger.each("system") == 0)
        if without > len(systems) / 2:
            mask = look.used & (look.ledger.each("system") != 0)
        yield Finding(
            "system prompts", KNOW, min(without, len(systems) - without),
            f"{_rows(len(systems) - without, 'have')} a system prompt, {without:,} have none.",
            "At use the model should be given what it saw most: decide for one of the two.", look.places(mask),
        )  # fmt: skip
    if 1 < len(values) <= max(10, 0.05 * counts.sum()):
        rare = values[counts < counts.max()]
        mask = look.used & numpy.isin(look.ledger.each("system"), rare)
        yield Finding(
            "system prompts", KNOW, int(mask.sum()), f"There are {len(values):,} different system prompts.",
            "Fine where they are meant; a stray one weakens what the others teach.", look.places(mask),
        )  # fmt: skip


def _turns(look: Look) -> Iterator[Finding]:
    if count := int((mask := look.flagged(facts.DOUBLED)).sum()):
        yield Finding(
            "turns in a row", KNOW, count, f"In {_rows(count)} one side speaks twice in a row.",
            "Some templates refuse that. Join such turns.", look.places(mask),
        )  # fmt: skip
    if count := int((mask := look.flagged(facts.OPEN_END)).sum()):
        yield Finding(
            "open end", KNOW, count, f"{_rows(count, 'go')} on after the last answer.",
            "What follows it is not learnt.", look.places(mask),
        )  # fmt: skip
