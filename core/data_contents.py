"""Findings in what the rows say: answers, tool calls, texts, repetitions, system prompts, turns."""

from collections import Counter
from collections.abc import Iterator

from core import data_facts as facts
from core.data_calls import NOT_JSON
from core.data_finding import FEW, HEAVY, KNOW, MANY, MEND, MOST, SHOWN, Finding, Look, many, rows

# --- what the rows say ---


def _answers(look: Look) -> Iterator[Finding]:
    import numpy

    blank = look.flagged(facts.BLANK_ANSWER)
    if count := int(blank.sum()):
        yield Finding(
            "blank answers", MEND, count, f"{many(count, 'answer')} blank: the model would learn to say nothing.",
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
            text = f"{rows(count, 'hold')} {words}."
            yield Finding(kind, MEND, count, text, remedy, look.places(mask), _call_detail(look, flag))


def _call_detail(look: Look, flag: int) -> str:
    """The tools whose calls are broken in a sentence, or the commonest ways in which calls do not fit."""
    problems: Counter[str] = sum((source.survey.problems for source in look.ledger.sources), Counter())
    common = [words for words, _ in problems.most_common()]
    if flag == facts.WRONG_CALL:
        return "; ".join([words for words in common if not words.endswith(NOT_JSON)][:3])
    tools = [words.removesuffix(f": {NOT_JSON}") for words in common if words.endswith(f": {NOT_JSON}")]
    if flag != facts.BROKEN_CALL or not tools:
        return ""
    more = f" and {len(tools) - 3} more tools" if len(tools) > 4 else ""
    return f"In calls of {', '.join(tools[: 3 if more else 4])}{more}."


def _texts(look: Look) -> Iterator[Finding]:
    templated = look.flagged(facts.TEMPLATED)
    if count := int(templated.sum()):
        yield Finding(
            "template in text", HEAVY if count > MOST * max(int(look.used.sum()), 1) else MEND, count,
            f"{rows(count, 'hold')} marks of a chat template in their text (<|im_start|>, [INST], ### Response …).",
            "They would be wrapped in a template twice: give the turns as messages.", look.places(templated),
        )  # fmt: skip
    if count := int((mask := look.flagged(facts.MOJIBAKE)).sum()):
        yield Finding(
            "mojibake", MEND, count, f"{rows(count, 'hold')} text that was decoded wrongly (Ã¤ for ä, â€™ for ’).",
            "finetui data clean --mend-encoding FILE OUT puts back what can be put back.", look.places(mask),
        )  # fmt: skip


def _repeats(look: Look) -> Iterator[Finding]:
    import numpy

    ledger = look.ledger
    order, _ = look.same_rows
    keys, labels = ledger.each("row_key")[order], look.labels[order]
    order = order[numpy.lexsort((order, labels, keys))] if len(order) else order
    keys, labels = ledger.each("row_key")[order], look.labels[order]
    again = numpy.zeros(len(order), bool)
    again[1:] = (keys[1:] == keys[:-1]) & (labels[1:] == labels[:-1])
    if repeated := int(again.sum()):
        shown = again | numpy.append(again[1:], False)
        yield Finding(
            "duplicates", MEND if repeated > 0.01 * int(look.used.sum()) else KNOW, repeated,
            f"{rows(repeated, 'repeat')} an earlier one word for word.",
            "--duplicates drop leaves them out; finetui data clean --drop-duplicates writes a copy without them.",
            look.places(order[shown]),
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
            "near duplicates", KNOW, count, f"About {rows(count, 'say')} almost the same as another.",
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
            f"{rows(len(systems) - without, 'have')} a system prompt, {without:,} have none.",
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
            "turns in a row", KNOW, count, f"In {rows(count)} one side speaks twice in a row.",
            "Some templates refuse that. Join such turns.", look.places(mask),
        )  # fmt: skip
    if count := int((mask := look.flagged(facts.OPEN_END)).sum()):
        yield Finding(
            "open end", KNOW, count, f"{rows(count, 'go')} on after the last answer.",
            "What follows it is not learnt.", look.places(mask),
        )  # fmt: skip


CONTENT_FINDINGS = (_answers, _calls, _texts, _repeats, _systems, _turns)
