"""Markdown with foreign text in it: what is not ours is shown and never obeyed."""

import re
from collections.abc import Sequence

from core.text import clean

# What Markdown or HTML in it would act on, wherever it stands in a line.
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>|#!~&$])")


def plain(text: object, limit: int = 300) -> str:
    """Foreign text in a line or a table's cell."""
    return _ACTIVE.sub(r"\\\1", clean(text, limit))


def block(text: object, limit: int = 4000) -> str:
    """Foreign text as a code block, line ends kept."""
    shown = clean(text, limit, newlines=True)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first column stands left, the others right. Cells are ready-made."""
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows)]
