"""A row as the model will see it, for a terminal without the app."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from core.text import clean

TRAINED, SPECIAL = "bold underline green", "magenta"


def show_row(console: Console, found: Mapping[str, Any], method: str, *, ids: bool = False) -> None:
    """Print what the lens says of a row: where it stands, what was cut, its turns, its text, trained tokens marked."""
    label = f", labelled {str(found['label']).lower()}" if found["label"] is not None else ""
    place = f"{found['file']}, line {found['line']:,}{label}"
    console.print(Text(clean(place, 400), "bold"))
    kept = f"{found['tokens']:,} tokens, {found['trained']:,} of them trained (underlined)"
    console.print(Text(f"{kept}; template: {clean(found['origin'], 80)}"))
    if found["left_out"]:
        console.print(Text(f"! left out: {clean(found['left_out'], 300)}", "yellow"))
    if found["cut"]:
        console.print(Text(f"! {found['cut']:,} tokens are cut from the left", "yellow"))
    for turn in found["turns"]:
        trained = f", {turn['trained']:,} trained" if turn["trained"] else ""
        console.print(Text(f"  {turn['role']:<10} {turn['tokens']:>6,} tokens{trained}", "dim"))
    console.print()
    console.print(ids_text(found) if ids else segments_text(found))
    if partner := found.get("partner"):
        words = f"KL partner in the first epoch: line {partner['line']:,}, {partner['tokens']:,} tokens"
        console.print(Text(f"\n{words}", "bold"))
        console.print(Text(clean(partner["text"], 1000, newlines=True), "dim"))


def segments_text(found: Mapping[str, Any]) -> Text:
    """The text with its trained stretches underlined and its special tokens visible."""
    text = Text()
    for words, trained, special, _ in found["segments"]:
        text.append(clean(words, 40_000, newlines=True), TRAINED if trained else SPECIAL if special else "")
    return text


def ids_text(found: Mapping[str, Any]) -> Text:
    """Every token with its id, one after the other."""
    text = Text()
    for number, words, trained, special in found["pieces"]:
        text.append(clean(words, 200), TRAINED if trained else SPECIAL if special else "")
        text.append(f"·{number} ", "dim")
    return text
