"""Make a large file of rows: ``python tests/bench/make_rows.py OUT.jsonl [--rows 1000000]``, about a kilobyte each.

Conversations of pseudo-words with a system prompt, a label and now and then a tool call; one row in a thousand is a
duplicate, one nearly, one unusable, one decoded wrongly. The same arguments make the same file.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "ti", "vo", "pe", "da", "gu", "hi", "jo", "be", "fa", "zu")
SYSTEMS = [f"You are assistant number {number}. Answer briefly and call a tool where one fits." for number in range(5)]
POOL = 4000
EVERY = 1000


def texts(chance: random.Random) -> list[str]:
    """Sentences of pseudo-words to draw from."""
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(8000)]
    return [" ".join(chance.choices(words, k=chance.randint(12, 80))) for _ in range(POOL)]


def rows(count: int, seed: int = 1) -> Iterator[str]:
    """`count` lines of JSON, about a thousand bytes each."""
    chance = random.Random(seed)
    pool = [json.dumps(text)[1:-1] for text in texts(chance)]
    before = ""
    for number in range(count):
        kind = number % EVERY
        if kind == 500 and before:
            yield before
            continue
        if kind == 501 and before:
            yield before.replace('"content": "', '"content": "well ', 1)
            continue
        if kind == 502:
            yield f'{{"id": {number}, "note": "no conversation"}}'
            continue
        asked = f"{number}: {chance.choice(pool)}{' GrÃ¼ÃŸe' if kind == 503 else ''}"
        answer = f"{chance.choice(pool)} {chance.choice(pool)}"
        if kind % 4 == 0:
            answer = f'tool_call: tool_{kind % 7}\\narguments: {{\\"text\\": \\"{answer}\\"}}'
        before = (
            f'{{"conversations": [{{"role": "system", "content": "{SYSTEMS[number % 5]}"}}, '
            f'{{"role": "user", "content": "{asked}"}}, {{"role": "assistant", "content": "{answer}"}}], '
            f'"label": {"true" if number % 3 else "false"}}}'
        )
        yield before


def write(path: Path, count: int, seed: int = 1) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for line in rows(count, seed):
            stream.write(f"{line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    write(options.out, options.rows, options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:,.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
