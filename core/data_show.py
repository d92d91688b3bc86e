"""A row as the model will see it, for a terminal without the app."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from core.text import clean

TRAINED, SPECIAL = "bold underline green", "magenta"
OPEN, CLOSE = "⟦", "⟧"
"""What stands around trained tokens where nothing can be underlined: in a pipe, a file, a dumb terminal."""


def show_row(console: Console, found: Mapping[str, Any], model: str, *, ids: bool = False) -> None:
    """Print what the lens says of a row: where it stands, what was cut, its turns, its text, trained tokens marked."""
    marked = console.color_system is None
    label = f", labelled {str(found['label']).lower()}" if found["label"] is not None else ""
    place = f"{found['file']}, line {found['line']:,}{label}"
    console.print(Text(clean(place, 400), "bold"))
    how = f"in {OPEN}{CLOSE}" if marked else "underlined"
    kept = f"{found['tokens']:,} tokens, {found['trained']:,} of them trained ({how})"
    console.print(Text(f"{kept}; {clean(model, 200)}; template: {clean(found['origin'], 80)}"))
    if found["left_out"]:
        console.print(Text(f"! left out: {clean(found['left_out'], 300)}", "yellow"))
    if found["cut"]:
        console.print(Text(f"! {found['cut']:,} tokens are cut from the left", "yellow"))
    for turn in found["turns"]:
        trained = f", {turn['trained']:,} trained" if turn["trained"] else ""
        console.print(Text(f"  {turn['role']:<10} {turn['tokens']:>6,} tokens{trained}", "dim"))
    console.print()
    console.print(joined(_tokens(found) if ids else _segments(found), marked=marked))
    if partner := found.get("partner"):
        words = f"KL partner in the first epoch: line {partner['line']:,}, {partner['tokens']:,} tokens"
        console.print(Text(f"\n{words}", "bold"))
        console.print(Text(clean(partner["text"], 1000, newlines=True), "dim"))


def _segments(found: Mapping[str, Any]) -> Iterable[tuple[str, str, bool, bool]]:
    for words, trained, special, _ in found["segments"]:
        yield clean(words, 40_000, newlines=True), "", trained, special


def _tokens(found: Mapping[str, Any]) -> Iterable[tuple[str, str, bool, bool]]:
    for number, words, trained, special in found["pieces"]:
        yield clean(words, 200), f"·{number} ", trained, special


def joined(pieces: Iterable[tuple[str, str, bool, bool]], *, marked: bool = False) -> Text:
    """(words, what stands behind them, trained, special) in one text, its trained stretches underlined, or `marked`."""
    text, within = Text(), False
    for words, behind, trained, special in pieces:
        if marked and trained != within:
            text.append(OPEN if trained else CLOSE)
        within = trained
        text.append(words, TRAINED if trained else SPECIAL if special else "")
        text.append(behind, "dim")
    if marked and within:
        text.append(CLOSE)
    return text
