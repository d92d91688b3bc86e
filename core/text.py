"""The one sanitiser: foreign text (rows, logs, names, errors, model output) on its way to a terminal."""

import math
import re

# Characters that a terminal acts on, or that reorder or hide what is read: C0 and C1 controls, bidirectional controls,
# line and paragraph separators, interlinear and invisible operators, the byte order mark, lone surrogates, tags.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def clean(text: object, limit: int = 4000, *, newlines: bool = False) -> str:
    """`text` without a character that a terminal would act on; what is taken out stays visible as a symbol.

    At most `limit` characters are kept. Line ends become ``⏎`` unless `newlines`; tabs become two spaces.
    """
    string = str(text)
    if len(string) > limit:
        string = f"{string[:limit]} … ({len(string) - limit} more characters)"
    string = string.replace("\r\n", "\n").replace("\t", "  ")
    string = _UNSAFE.sub(_visible, string)
    return string if newlines else string.replace("\n", "⏎")


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, cut between two words where it has any, with an ellipsis."""
    if len(text) <= limit:
        return text
    head = text[: limit - 2]
    words = head if text[limit - 2].isspace() else head.rpartition(" ")[0]
    return f"{words.rstrip() if len(words) > limit // 2 else head} …"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``42 s``, ``7 min 05 s``, ``3 h 12 min``; ``–`` for unknown."""
    if seconds is None or not 0 <= seconds < math.inf:
        return "–"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def count(value: object) -> str:
    """A whole number for people: ``2,998``; anything else, as a stranger's file may hold, as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float | None, digits: int = 4) -> str:
    """A metric for people; ``–`` for none."""
    if value is None or value != value:
        return "–"
    if value and (abs(value) < 10**-digits or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}" if abs(value) < 10 ** min(digits, 3) else f"{value:,.0f}"


