"""Render conversations with the tokenizer's chat template and find the tokens that are trained.

One function, `tokenize`, serves preview and training. The conversation is rendered and tokenised once; the spans of the
assistant turns are found from rendered prefixes and token offsets. A template for which a rendered prefix is not a
prefix of the rendered whole is refused by name: a mask is never guessed. Works on any fast tokenizer of transformers;
imports nothing heavy itself.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from core.data import Conversation
from core.data_limits import TOO_LONG, UNTRAINED, Limits, over_limit
from core.data_rows import TEXT_ROLE
from core.errors import FinetuiError
from core.paths import expanded

# Templates of families whose base models carry none; chosen by config.json's model_type and vocabulary size.
_INST = (
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
)
MISTRAL_TEMPLATE = _INST + (
    "{{- bos_token -}}{%- for message in turns -%}{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + eos_token -}}{%- else -%}"
    "{{- '[INST] ' + (system + '\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)
LLAMA2_TEMPLATE = _INST + (
    "{%- for message in turns -%}{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + ' ' + eos_token -}}{%- else -%}{{- bos_token + '[INST] ' + "
    "('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' -}}"
    "{%- endif -%}{%- endfor -%}"
)

PLAIN: list[tuple[int, int]] = []
"""The spans of a plain text: it is trained from its first token to its last."""
PROBE = [{"role": "user", "content": "finetui-user"}, {"role": "assistant", "content": "finetui-answer"}]
PROBE_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "finetui_probe", "arguments": {"finetui_key": "x"}}}],
}


class TemplateError(ValueError):
    """This conversation cannot be rendered or masked; the message is the reason."""


BATCH = 200
"""Rows tokenised in one call."""


@dataclass(frozen=True)
class Tokenised:
    """`input_ids` of the whole conversation and, of equal length, `trained`: True where the loss is taken."""

    input_ids: list[int]
    trained: list[bool]

    @property
    def measures(self) -> tuple[int, int, int, int]:
        """Tokens, the places of the first and last one that is trained, and how many are targets of the loss."""
        first = self.trained.index(True)
        last = len(self.trained) - 1 - self.trained[::-1].index(True)
        return len(self.input_ids), first, last, sum(self.trained) - (first == 0)

    @property
    def labels(self) -> list[int]:
        """The ids where trained, -100 elsewhere; the first position is never a target."""
        return [
            token if learnt and index else -100
            for index, (token, learnt) in enumerate(zip(self.input_ids, self.trained, strict=True))
        ]


@dataclass
class Template:
    """A tokenizer with what its chat template can do: found out once, by rendering probes."""

    tokenizer: Any
    renders_tool_calls: bool = False
    takes_system: bool = True

    @cached_property
    def end_tokens(self) -> set[int]:
        """Ids that may end a turn: every special token, for a template's end of turn need not be the model's eos."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {self.tokenizer.eos_token_id} | {number for number, token in added.items() if token.special}

    @classmethod
    def of(cls, tokenizer: Any) -> "Template":
        """Probe `tokenizer`. Raises FinetuiError when it is slow, has no template, or one that cannot be masked."""
        if not getattr(tokenizer, "is_fast", False):
            raise FinetuiError("The model has no fast tokenizer, which the loss mask needs.", "Choose another model.")
        if not tokenizer.chat_template:
            raise FinetuiError(
                "The model has no chat template, and its family is not one whose template is known.",
                "Give one with --set model.chat_template=FILE.jinja.",
            )
        template = cls(tokenizer)
        try:
            template.takes_system = "finetui-system" in template._render(
                [{"role": "system", "content": "finetui-system"}, *PROBE]
            )
        except TemplateError:
            template.takes_system = False
        try:
            called = template._render([PROBE[0], PROBE_CALL])
            template.renders_tool_calls = "finetui_probe" in called and "finetui_key" in called
        except TemplateError:
            template.renders_tool_calls = False
        try:
            template._spans(PROBE)
        except TemplateError as error:
            raise FinetuiError(
                f"The model's chat template cannot be masked: {error}.", "Give one with --set model.chat_template=FILE."
            ) from error
        return template

    def notices(self, rows: Iterable[Conversation]) -> list[str]:
        """What this template makes of `rows` other than they are, in sentences; empty where nothing."""
        systems = called = 0
        for row in rows:
            systems += any(message["role"] == "system" for message in row.messages)
            called += any(message.get("tool_calls") for message in row.messages)
        return self.changes(systems, called)

    def changes(self, systems: int, called: int) -> list[str]:
        """The same from counts: rows with a system turn, rows with tool calls apart from their text."""
        found = []
        if systems and not self.takes_system:
            where = "it goes before the text of the next user turn"
            found.append(f"The template has no system turn: {where} ({systems} rows).")
        if called and not self.renders_tool_calls:
            how = "they are written as text, tool_call: NAME"
            found.append(f"The template renders no tool calls: {how} ({called} rows).")
        return found

    def _render(self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a foreign program: whatever it raises is this row's reason
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise TemplateError(f"the chat template refuses it: {reason}") from error

    def prepared(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages in the form this template takes: tool calls as text, system text folded, where it must be."""
        ready = messages if self.renders_tool_calls else [_calls_as_text(message) for message in messages]
        ready = [{**message, "content": ""} if message["content"] is None else message for message in ready]
        if not self.takes_system:
            ready = _folded_system(ready)
        return ready

    def render(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        """The text of the prompt: `messages` followed by the opening of an assistant turn."""
        return self._render(self.prepared(messages), tools, prompt=True)

    def _spans(self, messages: list[dict[str, Any]], tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character span of every assistant turn that is trained."""
        whole = self._render(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            before = self._render(messages[:index], tools, prompt=True)
            through = whole if index == len(messages) - 1 else self._render(messages[: index + 1], tools)
            if not whole.startswith(before) or not whole.startswith(through) or len(before) > len(through):
                raise TemplateError("the chat template rewrites earlier turns, so the answer cannot be located")
            spans.append((len(before), len(through)))
        return whole, spans

    def laid_out(
        self, messages: list[dict[str, Any]], tools: Any = None, *, only_last: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text that is tokenised and the character spans in it that are trained. Raises TemplateError.

        Plain text stands as it is, ends with the tokenizer's end token and is trained as a whole.
        """
        if messages[0]["role"] == TEXT_ROLE:
            text, end = messages[0]["content"], self.tokenizer.eos_token or ""
            text = text if text.endswith(end) else text + end
            return text, [(0, len(text))]
        text, spans = self._spans(self.prepared(messages), tools)
        if not only_last or not spans:
            return text, spans
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if messages[last].get("weight") == 0:
            return text, []
        return text[: spans[-1][1]], spans[-1:]

    def turns(self, messages: list[dict[str, Any]], tools: Any = None) -> list[tuple[str, int]]:
        """(role, character at which it ends in the rendered text) of each turn, as far as the template tells.

        Turns that the template does not render by themselves come with the one after them.
        """
        ready = self.prepared(messages)
        whole = self._render(ready, tools)
        found: list[tuple[str, int]] = []
        for count in range(1, len(ready)):
            try:
                part = self._render(ready[:count], tools)
            except TemplateError:
                continue
            if whole.startswith(part) and len(part) > (found[-1][1] if found else 0):
                found.append((ready[count - 1]["role"], len(part)))
        return [*found, (ready[-1]["role"], len(whole))]

    def tokenize(self, messages: list[dict[str, Any]], tools: Any = None, *, only_last: bool = False) -> Tokenised:
        """Render, tokenise and mark the assistant turns, or only the last one.

        A token is trained when it starts inside an assistant turn; what a template writes after the end-of-turn token
        (a newline, usually) is not. Raises TemplateError with the reason.
        """
        found = self.tokenize_many([(messages, tools)], only_last=only_last)[0]
        if isinstance(found, TemplateError):
            raise found
        return found

    def tokenize_many(
        self, conversations: Sequence[tuple[list[dict[str, Any]], Any]], *, only_last: bool = False
    ) -> list[Tokenised | TemplateError]:
        """The same for several conversations (messages, tools) at once; a TemplateError stands where one was raised."""
        found: list[Tokenised | TemplateError] = []
        laid: list[tuple[int, list[tuple[int, int]]]] = []
        texts: list[str] = []
        for number, (messages, tools) in enumerate(conversations):
            try:
                text, spans = self.laid_out(messages, tools, only_last=only_last)
                plain = messages[0]["role"] == TEXT_ROLE
                texts.append(text)
                laid.append((number, spans if not plain else PLAIN))
                found.append(Tokenised([], []))
            except TemplateError as error:
                found.append(error)
        for plain in (False, True):
            chosen = [index for index, (_, spans) in enumerate(laid) if (spans is PLAIN) is plain]
            if not chosen:
                continue
            encoded = self._encode([texts[index] for index in chosen], special=plain)
            for index, encoding in zip(chosen, encoded, strict=True):
                number, spans = laid[index]
                found[number] = (
                    Tokenised(encoding.ids, [True] * len(encoding.ids))
                    if plain
                    else self._marked(encoding, texts[index], spans, only_last)
                )
        return found

    def _encode(self, texts: list[str], *, special: bool) -> Any:
        """The tokenizer's own encodings of texts: `special` adds what it puts around a text (a start token)."""
        return self.tokenizer(
            texts, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False,
            return_token_type_ids=False,
        ).encodings  # fmt: skip

    def encode_one(self, text: str) -> Any:
        """The tokenizer's own encoding of a rendered text."""
        return self._encode([text], special=False)[0]

    def _marked(self, encoding: Any, text: str, spans: list[tuple[int, int]], only_last: bool) -> Tokenised:
        """The ids of a text and which of them start inside one of the spans."""
        ids = encoding.ids
        trained = [False] * len(ids)
        for first, end in spans:
            stretch = list(range(first_token(encoding, first, text), first_token(encoding, end, text)))
            for position in self._without_tail(ids, stretch):
                trained[position] = True
        if only_last and any(trained):
            length = len(trained) - trained[::-1].index(True)
            ids, trained = ids[:length], trained[:length]
        return Tokenised(ids, trained)

    def _without_tail(self, ids: list[int], stretch: list[int]) -> list[int]:
        """The positions of an answer without the blanks that the template writes after the end-of-turn token."""
        ends = [number for number, position in enumerate(stretch) if ids[position] in self.end_tokens]
        if not ends:
            return stretch
        tail = stretch[ends[-1] + 1 :]
        blank = tail and not self.tokenizer.decode([ids[position] for position in tail]).strip()
        return stretch[: ends[-1] + 1] if blank else stretch


def first_token(encoding: Any, at: int, text: str) -> int:
    """The first token that starts at character `at` or behind it; the number of tokens where none does.

    Asks the encoding for single tokens: laying out the offsets of all costs more than tokenising.
    """
    covered = (encoding.char_to_token(place) for place in range(at, len(text)))
    token = next((found for found in covered if found is not None), len(encoding.ids))
    while token < len(encoding.ids) and _start(encoding, token) < at:
        token += 1
    while token and _start(encoding, token - 1) >= at:
        token -= 1
    return token


def _start(encoding: Any, token: int) -> int:
    return encoding.token_to_chars(token)[0]


def _calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls stand in its text as ``tool_call: NAME`` and ``arguments: {…}``."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    parts = [message["content"]] if message["content"] else []
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(f"tool_call: {function['name']}\narguments: {text}")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n\n".join(parts)}


def _folded_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System turns put before the text of the next user turn."""
    folded: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif waiting and message["role"] == "user":
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    if waiting:
        raise TemplateError("the chat template has no system turn, and no user turn follows to take this one's text")
    return folded


def family_template(config: dict[str, Any]) -> str | None:
    """The template of a base model's family by its config.json, or None: Mistral, and Llama 2 by its vocabulary."""
    if config.get("model_type") == "mistral":
        return MISTRAL_TEMPLATE
    if config.get("model_type") == "llama" and config.get("vocab_size") == 32000:
        return LLAMA2_TEMPLATE
    return None


def set_template(tokenizer: Any, choice: str, config: dict[str, Any]) -> str:
    """Give `tokenizer` its chat template and say where it comes from.

    `choice` is ``auto`` (its own, else its family's) or the path of a Jinja file. Raises FinetuiError.
    """
    if choice != "auto":
        try:
            tokenizer.chat_template = expanded(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FinetuiError(f"The chat template {choice} cannot be read.", "Give a Jinja file in UTF-8.") from error
        return f"file {choice}"
    if tokenizer.chat_template:
        return "the tokenizer's own"
    tokenizer.chat_template = family_template(config)
    return f"the family's, {config.get('model_type')}" if tokenizer.chat_template else "none"


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: for SFT the whole with every answer trained, for KTO cut at the last answer."""

    row: Conversation
    tokens: Tokenised

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens before the first trained one."""
        return self.tokens.input_ids[: self._first]

    @property
    def completion_ids(self) -> list[int]:
        """Tokens from the first trained one through the last."""
        return [token for token, trained in zip(self.tokens.input_ids, self.tokens.trained, strict=True) if trained]

    @property
    def _first(self) -> int:
        return self.tokens.trained.index(True)


@dataclass
class TokenLedger:
    """What tokenising did to the rows: kept, cut and left out, each named by file and line."""

    examples: Sequence[Example] = field(default_factory=list)
    cut: list[tuple[Conversation, int]] = field(default_factory=list)
    left_out: list[tuple[Conversation, str]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens.input_ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(sum(example.tokens.trained) for example in self.examples)


def tokenize_rows(
    template: Template,
    rows: list[Conversation],
    method: str,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: str = "drop",
    progress: Callable[[int, int], None] | None = None,
) -> TokenLedger:
    """Tokenise `rows` for ``"sft"`` or ``"kto"`` under the length limits (tokens).

    `too_long`: ``drop`` leaves a long row out, ``cut`` keeps its end (KTO: the end of the prompt and the whole answer),
    ``refuse`` raises. Raises FinetuiError when nothing trainable is left.
    """
    limits = Limits(method, max_length, max_prompt_length, too_long)
    examples: list[Example] = []
    ledger = TokenLedger(examples)
    for number in range(0, len(rows), BATCH):
        if progress:
            progress(number, len(rows))
        batch = rows[number : number + BATCH]
        found = template.tokenize_many([(row.messages, row.tools) for row in batch], only_last=method == "kto")
        for row, tokens in zip(batch, found, strict=True):
            _take(ledger, examples, row, tokens, limits)
    if not examples:
        raise nothing_left({reason for _, reason in ledger.left_out}, limits)
    return ledger


def _take(
    ledger: TokenLedger, examples: list[Example], row: Conversation, tokens: Tokenised | TemplateError, limits: Limits
) -> None:
    """Put one tokenised row where it belongs."""
    problem = untrainable(tokens)
    if problem or isinstance(tokens, TemplateError):
        ledger.left_out.append((row, problem))
        return
    over, lost = over_limit(limits, *tokens.measures[:3])
    if over > 0 and limits.too_long == "refuse":
        raise refused_length(row.file, row.line, len(tokens.input_ids), limits)
    if lost or (over > 0 and limits.too_long == "drop"):
        ledger.left_out.append((row, TOO_LONG))
        return
    if over > 0:
        ledger.cut.append((row, int(over)))
        tokens = Tokenised(tokens.input_ids[over:], tokens.trained[over:])
    examples.append(Example(row, tokens))


def untrainable(tokens: Tokenised | TemplateError) -> str:
    """Why nothing of a row can be trained; empty where something can."""
    if isinstance(tokens, TemplateError):
        return str(tokens)
    return "" if any(tokens.trained[1:]) else UNTRAINED


def refused_length(file: str, line: int, length: int, limits: Limits) -> FinetuiError:
    return FinetuiError(
        f"{file}, line {line}: {length} tokens, over the limit of {limits.max_length}.",
        "Raise max_length, or choose too_long: drop or cut.",
    )


def nothing_left(reasons: Iterable[str], limits: Limits) -> FinetuiError:
    named = sorted(reasons)[:2]
    return FinetuiError(
        f"No row is left after tokenising: {'; '.join(named)} (limit {limits.max_length} tokens).",
        "Raise max_length, or choose too_long: cut." if TOO_LONG in named else "Check the data.",
    )
