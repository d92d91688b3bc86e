"""A process that reads pieces of a large file: ``python -P -m core.data_worker``, started by `core.data_pool`."""

import gc
import sys
from typing import Any

from core.data_pool import read_message, write_message


def main() -> int:
    gc.disable()  # rows are trees without cycles, and looking for some costs a fifth of the time
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (request := read_message(source)) is not None:
        write_message(sink, answer(request))
    return 0


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks for."""
    if request.pop("do") == "sign":
        from core.data_repeats import sign_piece

        return sign_piece(**request)
    from core.data_pieces import check_piece

    return check_piece(**request)


if __name__ == "__main__":
    sys.exit(main())
