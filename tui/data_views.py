"""What the data room shows, as words: a row as the model sees it, findings, lengths, contents. No widgets."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from textual.content import Content

from core.data_headline import headline
from core.data_headline import number as counted
from core.data_shape import batch_words, round_up
from core.text import clean

TRAINED = "bold underline $text-success"
SPECIAL = "$text-accent"
MUTED = "$foreground-muted"
HUES = ("bold $text-error", "$text-warning", MUTED)
MAX_SHOWN, SIDE_FINDINGS = 12_000, 5
WEIGHTS = ("grave", "mend", "know")
"""What a finding's weight asks of the person."""
ROOMY = 8
TOKEN_HELP = "\nA token is a piece of a word. A higher limit takes more memory; trained are the tokens of the answers."
EIGHTHS = " ▁▂▃▄▅▆▇█"
SHAPES = {
    "messages": "turns with role and content", "sharegpt": "ShareGPT turns (from, value)",
    "prompt": "prompt and answer", "alpaca": "Alpaca (instruction, input, output)", "pairs": "preference pairs",
    "pairs, prompt implicit": "preference pairs that begin alike", "text": "plain text",
}  # fmt: skip
PARTS = {
    "messages": "turns", "completion": "answer", "chosen": "better answer", "rejected": "worse answer",
    "context": "text below the prompt", "history": "earlier turns", "system": "system prompt",
}  # fmt: skip
Reply = Mapping[str, Any]
ROW_HELP = Content.assemble(
    ("underlined", TRAINED), (": what it learns to say; ", MUTED), ("<|…|>", SPECIAL),
    (": the template's marks", MUTED),
)  # fmt: skip
"""How a row is read, where there is room for it."""


# --- rows ---


def row_head(stage: str, reply: Reply) -> Content:
    """Which row this is, its tokens, and for KTO whether its answer is a good one."""
    if reply.get("unused"):
        return Content.assemble(f"line {reply['line']:,}: ", ("not learned from", "$text-warning"))
    parts: list[Any] = [f"row {reply['at'] + 1:,} of {reply['of']:,} ", (f"(line {reply['line']:,})", MUTED), "  "]
    if reply["left_out"]:
        parts.append((f"{reply['tokens']:,} tokens, not learned from", "$text-warning"))
    else:
        parts += [f"{reply['tokens']:,} tokens, ", (f"{reply['trained']:,} trained", TRAINED)]
    if stage == "kto":
        parts += ["  ", ("✔ good answer", "$text-success") if reply["label"] else ("✘ bad answer", "$text-error")]
    if reply.get("held_out"):
        parts.append(("  held out", MUTED))
    return Content.assemble(*parts)


def row_words(stage: str, reply: Reply) -> Content:
    """A row turn by turn as the model will see it, trained tokens marked, special ones visible; first what was cut."""
    lines = []
    if reply["left_out"]:
        lines.append(Content.styled(f"! left out: {clean(reply['left_out'], 200)}", "$text-warning"))
        if not reply["tokens"]:
            lines.append(Content.styled("As it is written:", MUTED))
    if reply["cut"]:
        lines.append(Content.styled(f"! {reply['cut']:,} tokens are cut from the left", "$text-warning"))
    shown = ids_words(reply["pieces"]) if reply.get("pieces") else segments_words(stage, reply)
    lines.append(shown)
    if partner := reply.get("partner"):
        words = (
            f"KL partner: the answer of line {partner['line']:,}, which does not belong here. How likely the model "
            "finds it is the zero from which good and bad are measured (first epoch)."
        )
        lines += [Content.styled(f"\n{words}", f"bold {MUTED}"),
                  Content.styled(clean(partner["text"], 600, newlines=True), MUTED)]  # fmt: skip
    return Content("\n").join(lines)


def segments_words(stage: str, reply: Reply) -> Content:
    """The text, with a line before each turn that says whose it is and how much of it is trained."""
    turns = {turn["start"]: turn for turn in reply.get("turns", ())}
    last = max(turns, default=0)
    parts: list[Any] = []
    left, at = MAX_SHOWN, 0
    for segment in reply["segments"]:
        text, trained, special = segment[:3]
        if at in turns and (len(turns) > 1 or stage == "kto"):
            turn = turns[at]
            lead = "" if not parts or str(parts[-1][0]).endswith("\n") else "\n"
            words = f"{turn['tokens']:,} token{'s' if turn['tokens'] != 1 else ''}"
            words += f", {turn['trained']:,} trained" if turn["trained"] else ""
            if stage == "kto":
                words += " (prompt)" if at != last else f": the completion, labelled {str(reply.get('label')).lower()}"
            parts += [(f"{lead}{clean(turn['role'], 20)} ", f"bold {MUTED}"), (f"{words}\n", MUTED)]
        mark = f"{TRAINED} {SPECIAL if special else ''}".strip() if trained else SPECIAL if special else ""
        parts.append((clean(text, max(left, 0), newlines=True), mark))
        left -= len(text)
        at += segment[3] if len(segment) > 3 else 0
        if left <= 0:
            break
    return Content.assemble(*parts)


def ids_words(pieces: Sequence[Sequence[Any]]) -> Content:
    """Every token with its id."""
    parts: list[Any] = []
    for number, text, trained, special in pieces[:1500]:
        mark = f"{TRAINED} {SPECIAL if special else ''}".strip() if trained else SPECIAL if special else ""
        parts += [(clean(text, 100) or "∅", mark), (f"·{number} ", MUTED)]
    if len(pieces) > 1500:
        parts.append((f"… {len(pieces) - 1500:,} more", MUTED))
    return Content.assemble(*parts)


# --- findings ---


def findings_words(found: Sequence[Reply], chosen: int, whole: bool, width: int, height: int) -> Content:
    """The findings, the chosen one with its remedy and lines; where there is room, all of them with their remedies."""
    every = [finding_lines(entry, number == chosen, True, width) for number, entry in enumerate(found)]
    if sum(map(len, every)) > height:
        every = [finding_lines(entry, number == chosen, number == chosen, width) for number, entry in enumerate(found)]
    lines = [line for told in every for line in told]
    if not found:
        lines.append(Content.styled("✔ Nothing to mend was found.", "$text-success"))
    if not whole:
        lines.append(Content.styled("○ still looking for rows that say almost the same …", MUTED))
    elif len(lines) + 2 <= height:
        lines.append(Content.styled("\nl saves what becomes of every row: used, cut, left out and why", MUTED))
    return Content("\n").join(lines)


def finding_lines(entry: Reply, here: bool, remedy: bool, width: int) -> list[Content]:
    """A finding behind its weight in a word, with what to do about it, and where the person stands the lines."""
    mark = f"{'▸' if here else ' '} {entry['mark']:<2} {WEIGHTS[entry['weight']]:<5}  "
    under = " " * (len(mark) - 2)
    lines = hanging(mark, entry["text"], width, HUES[entry["weight"]], "bold" if here else "")
    if here and entry["detail"]:
        lines += hanging(f"{under}  ", entry["detail"], width, MUTED, MUTED)
    if remedy:
        lines += hanging(f"{under}→ ", entry["remedy"], width, "$text-accent" if here else MUTED, "" if here else MUTED)
    if here and (words := places_words(entry)):
        lines += hanging(f"{under}  ", words, width, MUTED, MUTED)
    return lines


def hanging(lead: str, text: str, width: int, hue: str, style: str = "") -> list[Content]:
    """A foreign text in lines of at most `width`, set in behind its lead."""
    pieces = textwrap.wrap(clean(text, 600), max(width - len(lead), 20)) or [""]
    return [
        Content.assemble((lead if not number else " " * len(lead), hue), (piece, style))
        for number, piece in enumerate(pieces)
    ]


def places_words(entry: Reply) -> str:
    """The lines to look at."""
    places = entry["places"]
    if not places:
        return ""
    one = len({file for file, _ in places}) == 1
    shown = [f"{line:,}" if one else f"{clean(file.rsplit('/', 1)[-1], 30)}:{line}" for file, line in places[:10]]
    more = " …" if entry["count"] > len(shown) else ""
    return f"line{'s' * (len(shown) > 1)} {', '.join(shown)}{more}   Enter shows the first, ← → the others"


def order(found: Sequence[Reply]) -> list[Reply]:
    """Findings of rows and of tokens, heaviest first."""
    return sorted(found, key=lambda entry: entry["weight"])


def tally(found: Sequence[Reply]) -> str:
    """How many findings there are of which weight."""
    heavy = sum(entry["weight"] == 0 for entry in found)
    mend = sum(entry["weight"] == 1 for entry in found)
    know = len(found) - heavy - mend
    words = [f"{count} {word}" for count, word in ((heavy, "grave"), (mend, "to mend"), (know, "to know")) if count]
    return ", ".join(words)


# --- lengths ---


def lengths_words(count: Reply, limit: Reply | None, at: int, kept: int, width: int, height: int) -> Content:
    """Histogram of tokens a row with the limit below it, what that limit does, answers, batches."""
    shape = count["shape"]
    rows, answers = shape["row_percentiles"], shape["answer_percentiles"]
    lines = [Content.assemble(("Tokens a row  ", "bold"), (percentile_words(rows), ""))]
    bars, scale = histogram_lines(shape["rows"], at, width - 2, height)
    lines += [*bars, *scale]
    told = limit or {"limit": shape["limit"], "at": kept, "exact": count["exact"]}
    lines.append(limit_words(told, at, kept))
    lines.append(Content.assemble(("Answers       ", "bold"), percentile_words(answers)))
    lines += wrapped("Batches       ", batch_words(shape).split(" "), width, " ")
    about = "" if count["exact"] else f"about; a sample of {count['sampled']:,} was counted, c counts every row   "
    tokens = f"{count['tokens']:,} tokens an epoch, {count['trained_tokens']:,} of them trained"
    lines.append(Content.assemble(("Epoch         ", "bold"), (about, "$text-warning"), tokens))
    if height >= ROOMY:
        lines.append(Content.styled(TOKEN_HELP, MUTED))
    return Content("\n").join(lines)


def percentile_words(found: Mapping[str, int]) -> str:
    if not found:
        return "none"
    return f"half have up to {found['50']:,}, 95 of 100 up to {found['95']:,}, the longest {found['100']:,}"


def histogram_lines(histogram: Reply, at: int, width: int, height: int) -> tuple[list[Content], list[Content]]:
    """Bars over a scale in tokens; what lies beyond the limit `at` is drawn light, and the limit marked below."""
    counts, edges = fewer(histogram["counts"], histogram["edges"], width)
    columns = columns_of(counts, width)
    most = max([*counts, 1])
    bars: list[Content] = []
    for level in range(height, 0, -1):
        parts: list[Any] = []
        for number, count in enumerate(counts):
            fill = count / most * height - (level - 1)
            step = 0 if not count else max(0, min(8, round(fill * 8)))
            glyph = EIGHTHS[max(step, 1 if count and level == 1 else 0)]
            wide = (number + 1) * columns // len(counts) - number * columns // len(counts)
            parts.append((glyph * wide, MUTED if edges[number] >= at else "$text-primary"))
        bars.append(Content.assemble(" ", *parts))
    marks = [" "] * (columns + 12)
    for number in range(0, len(edges), max(1, round_up(12 * len(counts) / columns))):
        for place, letter in enumerate(f"{edges[number]:,}", number * columns // len(counts)):
            if place < len(marks):
                marks[place] = letter
    place, words = min(round(at / edges[-1] * columns), columns), f"limit {at:,}"
    behind = place + len(words) + 2 < width and at <= edges[-1]
    pointer = " " * place + f"▲ {words}" if behind else f"{words} ▶".rjust(place + 1)
    return bars, [Content.styled(f" {''.join(marks).rstrip()}", MUTED), Content.styled(f" {pointer}", "$text-accent")]


def tokens_at(histogram: Reply, column: int, width: int) -> int:
    """The tokens that stand at a column of the histogram, from 0 at its left edge."""
    counts, edges = fewer(histogram["counts"], histogram["edges"], width)
    columns = columns_of(counts, width)
    return round(edges[-1] * max(0, min(column, columns)) / columns)


def columns_of(counts: Sequence[int], width: int) -> int:
    """Columns that a histogram takes: all there are, but no more than four for a bar."""
    return max(min(len(counts) * 4, width), 1)


def fewer(counts: Sequence[int], edges: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Buckets joined until there are at most `most`."""
    join = max(1, -(-len(counts) // max(most, 1)))
    joined = [sum(counts[at : at + join]) for at in range(0, len(counts), join)]
    step = (edges[1] - edges[0]) * join
    return joined, [step * at for at in range(len(joined) + 1)]


def wrapped(head: str, items: Sequence[str], width: int, between: str = " · ") -> list[Content]:
    """Items in lines of at most `width`, under each other behind the head."""
    lines, line = [], ""
    for item in items:
        longer = f"{line}{between if line else ''}{item}"
        if line and len(head) + len(longer) > width:
            lines.append(line)
            longer = item
        line = longer
    lines.append(line)
    lines = [piece for line in lines for piece in textwrap.wrap(line, max(width - len(head), 20)) or [""]]
    return [
        Content.assemble((head if not number else " " * len(head), "bold"), words) for number, words in enumerate(lines)
    ]


def limit_words(told: Reply, at: int, kept: int) -> Content:
    """What the limit does to the rows, and the keys that move it."""
    limit = told["limit"]
    if told["at"] != at:
        return Content.styled("○ counting …", MUTED)
    parts = [f"{limit['whole']:,} rows fit"]
    if limit["left_out"]:
        parts.append(f"{limit['left_out']:,} left out ({limit['left_out'] / max(limit['rows'], 1):.1%})")
    if limit["cut"]:
        parts.append(f"{limit['cut']:,} cut, {limit['answers_cut']:,} of them in the answer")
    hue = "$text-warning" if limit["left_out"] or limit["cut"] else ""
    keys = "← → moves it" + (f", k keeps {at:,} as max_length" if at != kept else "")
    return Content.assemble((f"At {at:,}: ", "bold"), (", ".join(parts), hue), (f"   {keys}", MUTED))


# --- contents ---


def contents_words(look: Reply, count: Reply, stage: str, width: int) -> Content:
    """Labels, turns, tools and columns: what the rows are made of."""
    content = look["content"]
    lines: list[Content] = []
    for entry in look["files"]:
        name = clean(str(entry["file"]).rsplit("/", 1)[-1], 60)
        weight = f", shown {entry['weight']:g} times an epoch" if entry["weight"] != 1 else ""
        blank = f", {entry['blank']:,} blank lines" if entry["blank"] else ""
        kind, _, more = entry["kind"].partition(",")
        words = f"{name}  {kind.upper()}{more and ',' + more}, {entry['rows']:,} rows{blank}{weight}"
        lines.append(Content.assemble(("File     ", "bold"), words))
        lines += wrapped("Columns  ", [*column_items(entry), "m changes that"], width, "; ")
    labels = labels_words(*balance(look, count), stage, max(width - 60, 10))
    lines.append(Content.assemble(("Labels   ", "bold"), labels))
    for number, (pattern, many) in enumerate(list(content["turns"].items())[:4]):
        head = "Turns    " if not number else "         "
        lines.append(Content.assemble((head, "bold"), f"{counted(many, 'row')}: {clean(pattern, 80)}"))
    if len(content["turns"]) > 4:
        lines.append(Content.styled(f"         and {len(content['turns']) - 4} other patterns", MUTED))
    if content["tools"]:
        named = [f"{clean(name, 40)} {count:,}" for name, count in content["tools"].items()]
        more = [f"and {len(named) - 12} more"] if len(named) > 12 else []
        lines += wrapped("Tools    ", [*named[:12], *more], width)
    for words, count in look["totals"]["repairs"].items():
        lines.append(Content.assemble(("Repaired ", "bold"), f"{count:,} × {clean(words, 100)}"))
    return Content("\n").join(lines)


def column_items(entry: Reply) -> list[str]:
    """The shape of the rows, which column is read as what, and which are not used."""
    shapes = ", ".join(SHAPES.get(shape, clean(shape, 40)) for shape in list(entry["shapes"])[:2]) or "nothing known"
    parts = [f"{clean(column, 30)} → {PARTS.get(part, part)}" for part, column in entry["parts"].items()]
    used = set(entry["parts"].values())
    unused = [clean(column, 24) for column in entry["columns"] if column not in used]
    rest = [f"not used: {', '.join(unused[:6])}{' …' if len(unused) > 6 else ''}"] if unused else []
    return [f"{shapes}: {', '.join(parts)}" if parts else shapes, *rest]


def balance(look: Reply, count: Reply) -> tuple[Mapping[str, int], Sequence[float] | None]:
    """(examples of an epoch by label, KTO's weights), after the length limit where all rows were counted."""
    known = count if count and count["exact"] else look
    return known["labels"], known["weights"]


def labels_words(labels: Mapping[str, int], weights: Sequence[float] | None, stage: str, width: int) -> Content:
    """The balance of good and bad answers as a bar, and the weights that follow from it."""
    good, bad, none = (labels.get(key, 0) for key in ("true", "false", "none"))
    if not bad or stage == "sft":
        parts = [f"{count:,} {word}" for count, word in ((good, "good"), (bad, "bad"), (none, "without")) if count]
        return Content(", ".join(parts))
    filled = round(width * good / (good + bad))
    bar: list[Any] = [f"{good:,} good ", ("█" * filled, "$text-success"), ("░" * (width - filled), "$text-error"),
                        f" {bad:,} bad"]  # fmt: skip
    if none:
        bar.append((f", {none:,} without", MUTED))
    if weights:
        bar.append("   weights {:.3g} and {:.3g}".format(*weights))
    return Content.assemble(*bar)


# --- all at once, beside the rows ---


def side_words(look: Reply, count: Reply, found: Sequence[Reply], limit: int, stage: str, width: int) -> Content:
    """The other views in a column: what was found, how long the rows are, how their labels stand, what they hold."""
    lines = [Content.styled("Findings", "bold")]
    for entry in found[:SIDE_FINDINGS]:
        lines += hanging(f"{entry['mark']:<2} ", entry["text"], width, HUES[entry["weight"]])
    if not found:
        lines.append(Content.styled("✔ nothing to mend was found", "$text-success"))
    if len(found) > SIDE_FINDINGS:
        lines.append(Content.styled(f"   and {len(found) - SIDE_FINDINGS} more", MUTED))
    if count:
        longest = count["shape"]["row_percentiles"]
        told = f"  95 of 100 up to {longest.get('95', 0):,}"
        lines += [Content(""), Content.assemble(("Tokens a row", "bold"), (told, MUTED))]
        bars, scale = histogram_lines(count["shape"]["rows"], limit, width - 2, 5)
        lines += [*bars, *scale]
    labels, weights = balance(look, count)
    if stage == "kto" and labels.get("true") and labels.get("false"):
        lines += [Content(""), Content.styled("Labels", "bold"), labels_words(labels, None, stage, width - 24)]
        lines += hanging("", "weights {:.3g} and {:.3g}".format(*(weights or (1, 1))), width, MUTED, MUTED)
    lines += [Content(""), Content.styled("Contents", "bold")]
    for pattern, many in list(look["content"]["turns"].items())[:2]:
        lines += hanging(f"{many:,} × ", pattern, width, MUTED, MUTED)
    if tools := look["content"]["tools"]:
        most = f"{counted(len(tools), 'tool')} called, most often {next(iter(tools))}"
        lines += hanging("", most, width, MUTED, MUTED)
    return Content("\n").join(lines)


# --- a line for each stage ---


def summary(look: Reply, count: Reply | None, stage: str) -> Content:
    """What will be learned from in a line; below it what is left out, and how many things there are to mend."""
    if look["problem"]:
        problem = look["problem"]
        wrong = (f"✘ {clean(shorter(problem['error'], look['files'][0]['file']), 400)}", "$text-error")
        return Content.assemble(wrong, f" {clean(problem['advice'], 300)}")
    told = headline(look, count, stage)
    lines = [Content.assemble(("✔ ", "$text-success"), told.rows)]
    below: list[Any] = [(f"  {clean(told.left_out, 400)}", "$text-warning")] if told.left_out else []
    weighty = [entry for entry in [*look["findings"], *(count or {}).get("findings", [])] if entry["weight"] < 2]
    if weighty:
        heaviest = order(weighty)[0]
        words = f"{heaviest['mark']} {len(weighty)} to mend"
        below += ["  ", (words, HUES[heaviest["weight"]]), (" (key 2)", MUTED)]
    return Content("\n").join([*lines, Content.assemble(*below)] if below else lines)


def shorter(words: str, file: str) -> str:
    """Words without the folders of a file whose path stands above them."""
    return words.replace(file, file.rsplit("/", 1)[-1])


def progress_words(progress: Reply) -> Content:
    """How far a look is, and what it has seen."""
    done, total = progress.get("done_bytes", 0), progress.get("total_bytes", 0)
    share = f"{done / total:.0%} " if total else ""
    if progress["phase"] == "near":
        return Content.styled(f"○ {share}looking for rows that say almost the same …", MUTED)
    seen = f"   {'; '.join(clean(words, 80) for words in progress['seen'][:3])}" if progress.get("seen") else ""
    return Content.assemble((f"○ {share}{progress['rows']:,} rows checked …", MUTED), (seen, "$text-warning"))


def hub_words(found: Reply) -> Content:
    """What a Hub data set offers, before anything is fetched."""
    size = f", {found['bytes'] / 1e6:,.1f} MB" if found["bytes"] else ""
    shapes = ", ".join(SHAPES.get(shape, clean(shape, 100)) for shape in list(found["shapes"])[:2])
    many = len(found["configs"])
    splits = sorted({split for config in found["configs"].values() for split in config})
    files = f"{len(found['chosen'])} file{'s' * (len(found['chosen']) > 1)}{size}"
    offers = f"{many} configurations; " if many > 1 else ""
    return Content.assemble(
        ("✔ on the Hub", "$text-success"), f": {files}; {shapes}  ",
        (f"({offers}splits: {clean(', '.join(splits[:6]), 80)}); fetched at the start, or now with f", MUTED),
    )  # fmt: skip


def hub_rows(found: Reply) -> Content:
    """The first rows of a Hub data set as they stand."""
    names = list(found["configs"])
    lines = [Content.styled("The first rows, as they stand on the Hub:", MUTED)]
    lines += [Content(clean(row, 800)) for row in found["rows"]]
    lines.append(Content.styled(f"Configurations: {clean(', '.join(names[:12]), 300)}", MUTED))
    lines.append(Content.styled(f"Files: {clean(', '.join(list(found['files'])[:8]), 400)}", MUTED))
    return Content("\n").join(lines)
