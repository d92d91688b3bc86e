"""The one expected exception."""


class FinetuiError(Exception):
    """Something the person can mend: what is wrong, and the way forward.

    ``message`` is one sentence about what is wrong; ``advice`` one sentence about what to do.
    ``exit_code`` is what the command line returns: 1 the run failed, 2 bad usage, plan or data, 3 no device or no room.
    """

    def __init__(self, message: str, advice: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()
