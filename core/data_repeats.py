"""Rows that say almost the same: near duplicates by MinHash and locality-sensitive hashing.

A conversation is the set of its runs of three words, system prompt apart. One permutation hashing (P. Li, A. Owen,
C.-H. Zhang, "One Permutation Hashing", NIPS 2012) puts the hashes of the set into 32 bins and keeps the least of each;
empty bins take their right neighbour's (A. Shrivastava, P. Li, "Densifying One Permutation Hashing via Rotation for
Fast Near Neighbor Search", ICML 2014), and 16 bits of each are kept (P. Li, A. C. König, "b-Bit Minwise Hashing", WWW
2010). The share of equal bins estimates the Jaccard similarity of two sets (A. Broder, "On the resemblance and
containment of documents", 1997). Rows that agree in one of eight bands of four bins are compared (Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", chapter 3): of pairs that are 90 % alike 99.9 % are looked at, 80 % alike 98 %.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.data_cache import CacheUnwritable, building, entry, key_of
from core.data_files import BOM
from core.data_pieces import ALONE_BYTES, Piece, pieces, row_of
from core.data_pool import Workers, worker_count
from core.data_rows import Message, RowError, names_of, read_row

if TYPE_CHECKING:
    import numpy

    from core.data_survey import Survey

BINS, BANDS, RUN = 32, 8, 3
ALIKE = 0.8
"""Share of equal bins from which on two rows are called near duplicates."""
FEWEST_WORDS = 8
"""Rows shorter than this are alike or not by chance."""
BATCH_BYTES = 64 << 10
WORKERS_FROM = 8 << 20
MOST_WORKERS = 2
"""Each holds numpy and takes some 55 MB."""
GROUPS = "groups.i64"


def text_of(messages: list[Message]) -> str:
    """What is compared of a conversation: all it says but the system prompt, and its calls."""
    parts = []
    for message in messages:
        if message["role"] != "system":
            parts.append(message["content"] or "")
            for call in message.get("tool_calls") or ():
                parts.append(f"{call['function']['name']} {call['function']['arguments']}")
    return " ".join(parts)


def sign_piece(
    path: str, start: int, end: int, columns: Mapping[str, str] | None = None, spooled: bool = False
) -> dict[str, Any]:
    """Signatures of the conversations of a piece, in the order in which `check_piece` has them: 32 bins of 16 bits."""
    signer = _signer()
    signed: list[bytes] = []
    batch: list[bytes] = []
    size = 0
    for text in _texts(Piece(path, start, end), names_of(columns), spooled):
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            signed.append(signer.sign(batch).tobytes())
            batch, size = [], 0
    if batch:
        signed.append(signer.sign(batch).tobytes())
    return {"signatures": b"".join(signed)}


def _texts(piece: Piece, names: Mapping[str, tuple[str, ...]], spooled: bool) -> Iterator[bytes]:
    for offset, line in piece.lines():
        line = line if offset else line.removeprefix(BOM)
        if not line or line.isspace():
            continue
        try:
            pairs = read_row(row_of(line, spooled), names).pairs
        except RowError:
            continue
        for messages, _ in pairs:
            yield text_of(messages).encode()


_kept: list["Signer"] = []


def _signer() -> "Signer":
    if not _kept:
        _kept.append(Signer())
    return _kept[0]


class Signer:
    """Signatures of texts, many at a time: a handful of passes over their bytes, without a loop over words."""

    def __init__(self) -> None:
        import numpy

        chance = numpy.random.default_rng(20121)
        self._letters = chance.integers(1, 2**64 - 1, 256, "u8", endpoint=True)
        self._letters[ord("A") : ord("Z") + 1] = self._letters[ord("a") : ord("z") + 1]
        self._base = numpy.uint64(0x9E3779B97F4A7C15)
        self._inverse = numpy.uint64(pow(int(self._base), -1, 2**64))
        self._powers = self._inverses = numpy.ones(1, "u8")
        self._factors = chance.integers(1, 2**63, RUN, "u8") * numpy.uint64(2) + numpy.uint64(1)

    def _grow(self, size: int) -> None:
        import numpy

        if len(self._powers) < size:
            ones = numpy.ones(max(size, 2 * BATCH_BYTES), "u8")
            for name, base in (("_powers", self._base), ("_inverses", self._inverse)):
                steps = ones.copy()
                steps[1:] = base
                setattr(self, name, numpy.cumprod(steps, dtype="u8"))

    def sign(self, texts: Sequence[bytes]) -> "numpy.ndarray":
        """(texts, 32) bins of 16 bits; all zero for texts of fewer than FEWEST_WORDS words."""
        import numpy

        letters = numpy.frombuffer(b"\0".join([*texts, b""]), "u1")
        self._grow(len(letters) + 1)
        blank = letters <= 32
        edges = numpy.diff(blank.view("i1"), prepend=1, append=1)
        starts, ends = numpy.flatnonzero(edges == -1), numpy.flatnonzero(edges == 1)
        sums = numpy.zeros(len(letters) + 1, "u8")
        numpy.cumsum(self._letters[letters] * self._powers[: len(letters)], out=sums[1:])
        words = (sums[ends] - sums[starts]) * self._inverses[starts]
        bounds = numpy.cumsum([len(text) + 1 for text in texts])
        owner = numpy.searchsorted(bounds, starts, side="right")
        counts = numpy.bincount(owner, minlength=len(texts))
        bins = self._bins(words, owner, len(texts))
        signed = _densified(bins).astype("u2")
        signed[counts < FEWEST_WORDS] = 0
        return signed

    def _bins(self, words: "numpy.ndarray", owner: "numpy.ndarray", count: int) -> "numpy.ndarray":
        """The least hash of each bin of each text; the largest number where a bin is empty."""
        import numpy

        bins = numpy.full(count * BINS, numpy.iinfo("u8").max, "u8")
        if len(words) >= RUN:
            runs = sum(words[at : len(words) - RUN + 1 + at] * factor for at, factor in enumerate(self._factors))
            runs ^= runs >> numpy.uint64(29)
            runs *= numpy.uint64(0xBF58476D1CE4E5B9)
            runs ^= runs >> numpy.uint64(32)
            whole = owner[: len(runs)] == owner[RUN - 1 :]
            runs, mine = runs[whole], owner[: len(runs)][whole]
            numpy.minimum.at(bins, mine * BINS + (runs >> numpy.uint64(59)).astype("i8"), runs << numpy.uint64(5))
        return bins.reshape(count, BINS)


def _densified(bins: "numpy.ndarray") -> "numpy.ndarray":
    """16 bits of each bin, with empty bins filled from the next full one on their right, told apart by the distance."""
    import numpy

    empty = bins == numpy.iinfo("u8").max
    short = (bins >> numpy.uint64(24)) & numpy.uint64(0xFFFF)
    for _ in range(BINS - 1):
        fillable = empty & ~numpy.roll(empty, -1, axis=1)
        short = numpy.where(fillable, numpy.roll(short, -1, axis=1) + numpy.uint64(0x2F1B), short)
        empty &= ~fillable
    return short & numpy.uint64(0xFFFF)


@dataclass(frozen=True)
class Repeats:
    """Groups of conversations: `group` has for each the number of the first one it is alike, itself where it is not."""

    group: "numpy.ndarray"

    def members(self) -> dict[int, list[int]]:
        """The groups of more than one, by their first conversation, largest first."""
        import numpy

        others = numpy.flatnonzero(self.group != numpy.arange(len(self.group)))
        found: dict[int, list[int]] = {}
        for other in others.tolist():
            found.setdefault(int(self.group[other]), [int(self.group[other])]).append(other)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def near_duplicates(
    survey: "Survey", say: Callable[[int, int], None] | None = None, *, workers: int | None = None
) -> Repeats:
    """Find near duplicates among the conversations of a survey. `say` is told (bytes done, bytes in all).

    Rows that are equal word for word are told from these by the survey's keys; here they fall into one group as well.
    Kept in the cache where the file is large.
    """
    import numpy

    large = survey.size > ALONE_BYTES
    key = key_of("repeats", survey.spooled, survey.content, survey.mapping) if large else ""
    if folder := (entry(key) if key else None):
        return Repeats(numpy.fromfile(folder / GROUPS, "i8"))
    group = groups_of(signatures_of(survey, say, min(worker_count(), MOST_WORKERS) if workers is None else workers))
    if key:
        with contextlib.suppress(CacheUnwritable), building(key) as fresh:
            group.tofile(fresh / GROUPS)
    return Repeats(group)


def signatures_of(survey: "Survey", say: Callable[[int, int], None] | None, workers: int) -> "numpy.ndarray":
    """(conversations, 32) bins; all zero for those too short to compare."""
    import numpy

    survey.let_go()
    requests: list[dict[str, Any]] = [
        {"path": survey.rows_path, "start": start, "end": end, "columns": survey.mapping, "spooled": survey.spooled}
        for start, end in pieces(survey.size)
    ]
    if survey.size <= WORKERS_FROM:
        signed = [sign_piece(**request)["signatures"] for request in requests]
        return numpy.frombuffer(b"".join(signed), "u2").reshape(-1, BINS)
    signatures = numpy.zeros((survey.conversations, BINS), "u2")
    start = 0
    with Workers(workers) as pool:
        asked = ({"do": "sign", **request} for request in requests)
        for request, reply in zip(requests, pool.replies(asked), strict=True):
            found = numpy.frombuffer(reply["signatures"], "u2").reshape(-1, BINS)
            signatures[start : start + len(found)] = found
            start += len(found)
            if say:
                say(request["end"], survey.size)
    return signatures


def groups_of(signatures: "numpy.ndarray") -> "numpy.ndarray":
    """For each signature the number of the first one it is alike, over any number of steps."""
    import numpy

    leader: dict[int, int] = {}  # of those that are alike an earlier one

    def root(at: int) -> int:
        while at in leader:
            if leader[at] in leader:
                leader[at] = leader[leader[at]]
            at = leader[at]
        return at

    told = numpy.flatnonzero(signatures.any(axis=1))
    bands = numpy.ascontiguousarray(signatures).view("u8").reshape(len(signatures), BANDS)
    for band in range(BANDS):
        keys = bands[told, band]
        order = numpy.argsort(keys, kind="stable")
        same = numpy.flatnonzero(keys[order][1:] == keys[order][:-1])
        ones, others = told[order[same]], told[order[same + 1]]
        alike = (signatures[ones] == signatures[others]).sum(axis=1) >= ALIKE * BINS
        for one, other in zip(ones[alike].tolist(), others[alike].tolist(), strict=True):
            first, second = sorted((root(one), root(other)))
            if first != second:
                leader[second] = first
    groups = numpy.arange(len(signatures), dtype="i8")
    for at in leader:
        groups[at] = root(at)
    return groups
