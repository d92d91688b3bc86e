"""The tokens of an example cut into stretches that can be shown: by what is trained, by turn, or one by one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from core.chat import Template, TemplateError, Tokenised, first_token
from core.data import Conversation
from core.data_rows import TEXT_ROLE

MAX_TOKENS_SHOWN = 8000
MAX_CHARACTERS = 40_000
MAX_PIECES = 2000
Segment = tuple[str, bool, bool, int]


def segments(template: Template, tokens: Tokenised, starts: Sequence[int] = ()) -> list[Segment]:
    """The tokens as (text, trained, special, tokens) in stretches of one kind, each special token by itself.

    A stretch begins anew at each of `starts`, where turns begin.
    """
    ids, labels = tokens.input_ids[:MAX_TOKENS_SHOWN], tokens.labels[:MAX_TOKENS_SHOWN]
    special = template.end_tokens
    stretches: list[tuple[int, bool, bool]] = []
    kinds = [(label != -100, token in special, token in special and index, bisect_right(starts, index))
             for index, (token, label) in enumerate(zip(ids, labels, strict=True))]  # fmt: skip
    end = 0
    for (trained, marked, *_), group in groupby(kinds):
        end += len(list(group))
        stretches.append((end, trained, marked))
    found: list[Segment] = []
    start, left = 0, MAX_CHARACTERS
    for end, trained, marked in stretches:
        text = decoded(template, ids[start:end])
        if not marked and start and len(stretches) < 200:  # some decoders drop the blank before a word that comes first
            before, whole = decoded(template, ids[:start]), decoded(template, ids[:end])
            text = whole[len(before) :] if whole.startswith(before) else text
        found.append((text[:left], trained, marked, end - start))
        left -= len(text)
        start = end
        if left <= 0:
            break
    if start < len(tokens.input_ids) or left < 0:
        found.append((f" … ({len(tokens.input_ids):,} tokens in all)", False, False, 0))
    return found


def decoded(template: Template, ids: list[int]) -> str:
    return template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_list(template: Template, tokens: Tokenised) -> list[tuple[int, str, bool, bool]]:
    """(id, text, trained, special) of each token, of the first 2,000."""
    special = template.end_tokens
    pairs = list(zip(tokens.input_ids, tokens.labels, strict=True))[:MAX_PIECES]
    return [(token, decoded(template, [token]), label != -100, token in special) for token, label in pairs]


def turn_list(template: Template, row: Conversation, tokens: Tokenised, cut: int) -> list[dict[str, Any]]:
    """Role, tokens and trained tokens of each turn that is left, and where it ends among the tokens."""
    if not tokens.input_ids:
        return []
    if row.messages[0]["role"] == TEXT_ROLE:
        return [turn("text", tokens, 0, len(tokens.input_ids))]
    try:
        turns = template.turns(row.messages, row.tools)
        text, _ = template.laid_out(row.messages, row.tools)
    except TemplateError:
        return []
    encoding = template.encode_one(text)
    found, start = [], 0
    for role, end_at in turns:
        end = min(max(first_token(encoding, end_at, text) - cut, 0), len(tokens.input_ids))
        if end > start:
            found.append(turn(role, tokens, start, end))
            start = end
    return found


def turn(role: str, tokens: Tokenised, start: int, end: int) -> dict[str, Any]:
    trained = sum(label != -100 for label in tokens.labels[start:end])
    return {"role": role, "start": start, "end": end, "tokens": end - start, "trained": trained}
