"""The length limits of a stage: how many tokens a row must lose, and whether an answer is left then."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.plan import KTOPlan, StagePlan

if TYPE_CHECKING:
    import numpy

TOO_LONG = "longer than the limit"
UNTRAINED = "no trained token: the answer renders to nothing"


@dataclass(frozen=True)
class Limits:
    """`max_length` tokens a row, for KTO `max_prompt_length` tokens a prompt; `too_long` drop, cut or refuse."""

    method: str
    max_length: int
    max_prompt_length: int | None = None
    too_long: str = "drop"

    @classmethod
    def of(cls, stage: StagePlan, method: str) -> "Limits":
        prompt = stage.max_prompt_length if isinstance(stage, KTOPlan) else None
        return cls(method, stage.max_length, prompt, stage.data.too_long)


def over_limit(limits: Limits, length: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """(tokens that must go from the left, whether no answer is left then), for numpy arrays of rows.

    `length` tokens of the row; `first` and `last` positions of its trained tokens. A row of which only the first token
    would be trained is lost, for the first place is never a target. KTO keeps the answer whole and a token of the
    prompt at least.
    """
    import numpy

    over = numpy.maximum(length - limits.max_length, 0)
    if limits.method == "kto":
        over = numpy.maximum(over, first - (limits.max_prompt_length or first))
        return over, over >= first
    return over, (over >= last) & (over > 0)


@dataclass(frozen=True)
class Lengths:
    """Rows in tokens: arrays of the length, the positions of the first and last trained token, the trained tokens."""

    length: "numpy.ndarray"
    first: "numpy.ndarray"
    last: "numpy.ndarray"
    trained: "numpy.ndarray"

    def at_limit(self, limits: Limits) -> dict[str, int]:
        """What limits would do to these rows: kept whole, cut, answers cut, left out, tokens kept and tokens cut."""
        over, lost = over_limit(limits, self.length, self.first, self.last)
        gone = over > 0 if limits.too_long != "cut" else lost
        cut = (over > 0) & ~gone
        kept = (self.length - over)[~gone]
        return {
            "rows": len(over), "whole": int((over == 0).sum()), "cut": int(cut.sum()),
            "answers_cut": int((cut & (over > self.first)).sum()), "left_out": int(gone.sum()),
            "tokens": int(kept.sum()), "tokens_cut": int(over[cut].sum()),
            "longest": int(kept.max()) if len(kept) else 0,
        }  # fmt: skip
