"""What a finding is, and what findings are drawn from."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core.data_ledger import LEFT_OUT, Ledger
from core.data_repeats import Repeats
from core.data_survey import Survey

if TYPE_CHECKING:
    import numpy

HEAVY, MEND, KNOW = 0, 1, 2
MARKS = ("!!", "!", "·")
SHOWN = 20
MOST, MANY = 0.5, 0.2
FEW = 20

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

    @cached_property
    def same_rows(self) -> "tuple[numpy.ndarray, numpy.ndarray]":
        """(numbers of the used conversations that are equal word for word, equal ones together; where groups begin)."""
        import numpy

        mine = numpy.flatnonzero(self.used)
        keys = self.ledger.each("row_key")[mine]
        order = numpy.argsort(keys, kind="stable")
        keys = keys[order]
        same = numpy.zeros(len(keys), bool)
        same[1:] = keys[1:] == keys[:-1]
        kept = same | numpy.append(same[1:], False) if len(keys) else same
        starts = numpy.flatnonzero(~same[kept])
        return mine[order[kept]], starts

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


def rows(count: int, verb: str = "") -> str:
    """``1 row holds``, ``2 rows hold``: the verb as it stands with several."""
    if count != 1:
        return f"{count:,} rows {verb}".rstrip()
    return f"1 row {SINGULAR.get(verb, f'{verb}s' if verb else '')}".rstrip()


def many(count: int, word: str) -> str:
    """``1 answer is``, ``2 answers are``."""
    return f"{count:,} {word} is" if count == 1 else f"{count:,} {word}s are"


SINGULAR = {"are": "is", "say": "says", "have": "has", "go": "goes", "lose": "loses"}
