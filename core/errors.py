"""The one expected exception."""

from collections.abc import Iterator
from contextlib import contextmanager


class FinetuiError(Exception):
    """Something the person can mend: what is wrong, and the way forward.

    ``message`` is one sentence about what is wrong; ``advice`` one sentence about what to do.
    ``exit_code`` is what the command line returns: 1 the run failed, 2 bad usage, plan or data, 3 no device or no room.
    ``about`` is the part of the plan in which it can be mended, as a dotted path; empty where that is not known.
    """

    about = ""

    def __init__(self, message: str, advice: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()


@contextmanager
def about(part: str) -> Iterator[None]:
    """Within this, a FinetuiError that does not say which part of the plan it is about is about `part`."""
    try:
        yield
    except FinetuiError as error:
        error.about = error.about or part
        raise
