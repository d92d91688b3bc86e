"""What a report that is sent away must not tell: where files lie on this machine, and what the machine is called."""

import re
from pathlib import PurePosixPath, PureWindowsPath

# An absolute path, a drive's or one below home; not the path of an address (https://…) and not a bare /word.
_PATH = re.compile(r"(?<![\w:/.\\~-])(?:~|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/'\"<>|,;:()\[\]{}*?]+){2,}[\\/]?")


def last_part(path: str) -> str:
    """The name of the file or folder a path leads to."""
    pure = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    return pure.name or path


def without_places(text: str, host: str = "") -> str:
    """`text` with each path cut to its last part, and without the machine's name."""
    shown = _PATH.sub(lambda match: last_part(match.group()), text)
    if len(host) > 2:
        shown = re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "…", shown)
    return shown


def value_without_places(value: object) -> object:
    """A value of a plan: a path becomes its last part, and so do those in lists."""
    if isinstance(value, list):
        return [value_without_places(item) for item in value]
    if isinstance(value, dict):
        return {key: value_without_places(item) for key, item in value.items()}
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", value)):
        return last_part(value)
    return without_places(value) if isinstance(value, str) else value
