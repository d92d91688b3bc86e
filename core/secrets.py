"""Tokens are taken out of whatever is written down: events, and what a child of a run prints into its log."""

import functools
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import IO, Any, cast

NAMES = re.compile(
    r"(?:^|_)(?:TOKENS?|(?:API)?KEYS?|SECRETS?|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|JWT|DSN|WEBHOOK|CONNECTION_STRING)(?:$|_)"
    r"|PASSWORD|^SSHPASS$|^MYSQL_PWD$|^FINETUI_ON_END$", re.IGNORECASE,
)  # fmt: skip
HUB_NAMES = re.compile(r"^(?:HF|HUGGING_?FACE)_|_PROXY$", re.IGNORECASE)
"""What a child that asks the Hub needs of what may be secret: its token, its address, a proxy with a password."""
TRACKER_NAMES = {"wandb": "WANDB_", "trackio": "TRACKIO_"}
SHORTEST = 8
IN_ADDRESS = r"(?<=://)[^\s/:@\"']*:[^\s/@\"']+(?=@)"
"""User and password of an address, as a proxy, a mirror or a package index may have them."""
FORMS = r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bwandb_v1_[A-Za-z0-9_]{20,}"
HIDDEN = "‹secret›"


@functools.lru_cache(8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, values), FORMS, IN_ADDRESS]))


def _values() -> tuple[str, ...]:
    """The secrets of this process's environment, the longest first."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and NAMES.search(name)}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def without_secrets() -> dict[str, str]:
    """The environment for a child that asks nobody for anything: no token, no key, no password in an address."""
    telling = _pattern(())
    return {name: value for name, value in os.environ.items() if not NAMES.search(name) and not telling.search(value)}


def hub_environment() -> dict[str, str]:
    """The environment for a child that may ask the Hub and nobody else: no secret but those that this needs."""
    return without_secrets() | {name: value for name, value in os.environ.items() if HUB_NAMES.search(name)}


def tracker_environment(trackers: Iterable[str] = tuple(TRACKER_NAMES)) -> dict[str, str]:
    """What these trackers find in the environment: address and key."""
    starts = tuple(TRACKER_NAMES[tracker] for tracker in trackers if tracker in TRACKER_NAMES)
    return {name: value for name, value in os.environ.items() if starts and name.startswith(starts)}


def redact(text: str) -> str:
    """`text` without the environment's secrets, passwords in addresses, and what has the form of a well-known token."""
    return _pattern(_values()).sub(HIDDEN, text)


class _Guarded:
    """A stream that writes redacted text; everything else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """What this process prints, tracebacks too, holds no secrets from now on."""
    guarded = {stream: cast(IO[str], _Guarded(stream)) for stream in (sys.stdout, sys.stderr)}
    for logger in [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]:
        for handler in logger.handlers:  # libraries took their stream when they were imported
            stream = vars(handler).get("stream")  # others ask sys for it each time
            if isinstance(handler, logging.StreamHandler) and stream in guarded:
                handler.setStream(guarded[stream])
    sys.stdout, sys.stderr = guarded[sys.stdout], guarded[sys.stderr]
