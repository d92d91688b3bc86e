"""What is worth knowing about a stage's rows before they are trained: each finding with lines to look at and a remedy.

Findings are sentences for people who may never have trained a model. The heaviest come first: what spoils the training
(``!!``), what probably should be mended (``!``), what is good to know (``·``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from core import data_facts as facts
from core.data import REPAIR, remedy_of
from core.data_contents import CONTENT_FINDINGS
from core.data_finding import FEW, HEAVY, KNOW, MEND, MOST, SHOWN, Finding, Look, many, rows
from core.data_limits import TOO_LONG

if TYPE_CHECKING:
    pass

SKEWED = 10


def findings(look: Look) -> list[Finding]:
    """Every finding, heaviest first."""
    makers: tuple[Callable[[Look], Iterator[Finding]], ...] = (
        _plan, _unusable, _labels, _conflicts, _leaks, length_findings, *CONTENT_FINDINGS,
    )  # fmt: skip
    found = [finding for maker in makers for finding in maker(look)]
    return sorted(found, key=lambda finding: finding.weight)


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
            "few rows", MEND, count, f"Only {count} example{'s' * (count > 1)} to learn from.",
            "Some dozens teach a form, some hundreds a skill. Watch for answers learnt by heart.",
        )  # fmt: skip
    if look.kto and count:
        counts = look.ledger.label_counts()
        good, bad = counts[True], counts[False]
        if min(good, bad) and max(good, bad) > SKEWED * min(good, bad):
            rare, word = (good, "good") if good < bad else (bad, "bad")
            yield Finding(
                "skewed labels", MEND, rare, f"Only {rare:,} {word} answers stand beside {max(good, bad):,} others.",
                f"The weights make up for it on average only: most batches hold no {word} answer, and from such the "
                f"answers can fall apart. Add {word} ones, or leave some of the others out.",
                look.places(look.used & (look.labels == (word == "good"))),
            )  # fmt: skip


# --- rows that cannot be used ---


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
            shown = numpy.flatnonzero(numpy.isin(survey["reason"], numbers))[:SHOWN]
            places = [(survey.file, int(survey["line"][row])) for row in shown]
            often = sorted(((int(counts[number]), survey.reasons[number]) for number in numbers), reverse=True)
            reason = often[0][1] if len(often) == 1 else start
            detail = "; ".join(f"{many:,} × {words}" for many, words in often[:3]) if len(often) > 1 else ""
            heavy = HEAVY if count > MOST * survey.total else MEND
            text = f"{rows(count)} left out: {reason}."
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
            beside = "beside labelled ones, " if bool((look.labels >= 0).any()) else ""
            yield Finding(
                "unlabelled", MEND, count, f"{rows(count)} without a label, {beside}left out.",
                "Label them true or false, or train them with SFT.", look.places(mask),
            )  # fmt: skip
        elif reason.startswith("label is false"):
            yield Finding(
                "bad answers", KNOW, count, f"{many(count, 'answer')} labelled false and not learnt.",
                "That is as it should be; KTO uses them. --include-undesirable would learn them.", look.places(mask),
            )  # fmt: skip
        elif reason.startswith("plain text"):
            words = f"{rows(count)} left out: {reason}."
            yield Finding("plain text", MEND, count, words, "Use SFT.", look.places(mask))
    none, good = (look.used & (look.labels == code) for code in (-1, 1))
    if not look.kto and (count := int(none.sum())) and (labelled := int(good.sum())):
        fewer = none if count <= labelled else good
        yield Finding(
            "unlabelled", KNOW, count, f"{rows(count)} without a label beside {labelled:,} labelled true.",
            "SFT learns from both. Make sure that the unlabelled ones hold no bad answers.", look.places(fewer),
        )  # fmt: skip
    for source in ledger.sources:
        survey = source.survey
        read = [number for number, words in enumerate(survey.repairs) if words.startswith("label ")]
        there = numpy.flatnonzero(numpy.isin(survey["repair"], read)) if read else numpy.zeros(0, int)
        if len(there) and survey.kind not in ("csv", "tsv"):  # a cell of a table is always a text
            words = survey.repairs[int(survey["repair"][there[0]])]
            yield Finding(
                "label types", KNOW, len(there), f"{many(len(there), 'label')} no truth value ({words}).",
                "They were understood; " + REPAIR, [(survey.file, int(survey["line"][row])) for row in there[:SHOWN]],
            )  # fmt: skip


def _conflicts(look: Look) -> Iterator[Finding]:
    """The same prompt and answer with both labels."""
    import numpy

    order, starts = look.same_rows
    if not len(order):
        return
    labels = look.labels[order]
    group = numpy.repeat(numpy.arange(len(starts)), numpy.diff([*starts, len(order)]))
    both = (numpy.bincount(group, labels == 1) > 0) & (numpy.bincount(group, labels == 0) > 0)
    if count := int(both.sum()):
        yield Finding(
            "both labels", HEAVY, count, f"{many(count, 'answer')} labelled true and false for the same prompt.",
            "Only one label can be right: they cancel each other out. Mend or delete one of each.",
            look.places(order[both[group]]),
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
    prompts = long & (ledger.tokens <= look.max_length)  # KTO limits the prompt by itself
    if count := int(prompts.sum()):
        yield Finding(
            "prompts too long", MEND, count,
            f"{many(count, 'prompt')} longer than max_prompt_length, and the rows left out.",
            "Raise kto.max_prompt_length, or cut them from the left: too_long: cut.", look.places(prompts),
        )  # fmt: skip
    long &= ~prompts
    if count := int(long.sum()):
        share = count / max(int((ledger.tokens >= 0).sum()), 1)
        longest = int(ledger.tokens[long].max())
        order = numpy.flatnonzero(long)
        order = order[numpy.argsort(-ledger.tokens[order], kind="stable")]
        yield Finding(
            "too long", HEAVY if share > MOST else MEND, count,
            f"{rows(count, 'are')} longer than {look.max_length:,} tokens and left out; the longest has {longest:,}.",
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
            "cut", KNOW, count, f"{rows(count, 'lose')} {int(ledger.cut[cut].sum()):,} tokens from the left.",
            "Their system prompt and first turns go. Raise max_length to keep them.", look.places(cut),
        )  # fmt: skip
    for number, reason in enumerate(ledger.reasons):
        if "chat template" in reason or reason.startswith("no trained token"):
            mask = ledger.reason == number
            if count := int(mask.sum()):
                yield Finding(
                    "template", MEND, count, f"{rows(count)} left out: {reason}.",
                    "Mend the rows, or give another template: --set model.chat_template=FILE.jinja.", look.places(mask),
                )  # fmt: skip
