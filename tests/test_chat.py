"""The loss mask: exactly the answers are trained, whatever the template, and no row is cut or lost unsaid."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chat import (
    LLAMA2_TEMPLATE,
    MISTRAL_TEMPLATE,
    Example,
    Template,
    family_template,
    set_template,
    tokenize_rows,
)
from core.data import Conversation
from core.errors import FinetuiError

Dressed = Callable[..., Template]

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi there"}
ANSWER = {"role": "assistant", "content": "Hello!"}
MORE = {"role": "user", "content": "And now?"}
LAST = {"role": "assistant", "content": "Now it is 12345."}
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "set_timer", "arguments": {"minutes": 5, "what": "tea ü"}}}
    ],
}  # fmt: skip

HERMES = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IGNORES_SYSTEM = NO_SYSTEM.replace("{{ raise_exception('no system turn here') }}{% endif %}", "{% else %}").replace(
    "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"
)
# Like Qwen 3: what was thought is kept in the last answer only.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def dressed(tokenizer: Any) -> Dressed:
    """The demo's tokenizer, with another template and other special tokens where asked."""

    def dress(template: str | None = None, **special: str) -> Template:
        other = copy.deepcopy(tokenizer)
        for name, token in special.items():
            setattr(other, name, token)
        if template is not None:
            other.chat_template = template
        return Template.of(other)

    return dress


@pytest.fixture(scope="session")
def chatml(dressed: Dressed) -> Template:
    return dressed()


def row(*messages: dict[str, Any], line: int = 1, label: bool | None = None, tools: Any = None) -> Conversation:
    return Conversation("rows.jsonl", line, list(messages), label, tools)


def trained_texts(template: Template, messages: list[dict[str, Any]], **arguments: Any) -> list[str]:
    """The text of every stretch of trained tokens."""
    tokens = template.tokenize(messages, **arguments)
    stretches: list[list[int]] = []
    previous = False
    for token, trained in zip(tokens.input_ids, tokens.trained, strict=True):
        if trained:
            stretches = stretches if previous else [*stretches, []]
            stretches[-1].append(token)
        previous = trained
    return [template.tokenizer.decode(ids) for ids in stretches]


# --- the mask ---


def test_exactly_the_answers_are_trained_with_their_end_of_turn_and_without_the_newline_after_it(
    chatml: Template,
) -> None:
    conversation = [SYSTEM, USER, ANSWER, MORE, LAST]
    assert trained_texts(chatml, conversation) == ["Hello!<|im_end|>", "Now it is 12345.<|im_end|>"]
    assert trained_texts(chatml, conversation, only_last=True) == ["Now it is 12345.<|im_end|>"]


def test_nothing_is_lost_around_the_mask(chatml: Template) -> None:
    tokens = chatml.tokenize([SYSTEM, USER, ANSWER, MORE, LAST])
    assert chatml.tokenizer.decode(tokens.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nNow it is 12345.<|im_end|>\n"
    )


def test_what_follows_the_last_answer_is_no_part_of_a_kto_row(chatml: Template) -> None:
    tokens = chatml.tokenize([USER, ANSWER, MORE], only_last=True)
    assert tokens.trained[-1]
    assert chatml.tokenizer.decode(tokens.input_ids).endswith("assistant\nHello!<|im_end|>")


def test_the_templates_own_system_text_is_kept_and_not_trained(chatml: Template) -> None:
    tokens = chatml.tokenize([USER, ANSWER])
    assert "named SmolLM" in chatml.tokenizer.decode(tokens.input_ids)
    assert trained_texts(chatml, [USER, ANSWER]) == ["Hello!<|im_end|>"]


def test_labels_are_the_ids_where_trained_and_never_at_the_first_place(chatml: Template) -> None:
    tokens = chatml.tokenize([USER, ANSWER])
    assert tokens.labels[0] == -100 and len(tokens.labels) == len(tokens.input_ids)
    assert [label for label in tokens.labels if label != -100] == [
        token for token, trained in zip(tokens.input_ids, tokens.trained, strict=True) if trained
    ]
    everything = type(tokens)([5, 6], [True, True])
    assert everything.labels == [-100, 6]


def test_prompt_and_completion_are_the_whole_rows_ids_up_to_the_answers_end(chatml: Template) -> None:
    conversation = [SYSTEM, USER, ANSWER, MORE, LAST]
    whole = chatml.tokenize(conversation).input_ids
    example = Example(row(*conversation), chatml.tokenize(conversation, only_last=True))
    joined = example.prompt_ids + example.completion_ids
    assert joined == whole[: len(joined)]
    assert chatml.tokenizer.decode(whole[len(joined) :]) == "\n"
    assert chatml.tokenizer.decode(example.prompt_ids) == chatml.render(conversation[:-1])


def test_an_answer_is_trained_alike_at_the_end_and_in_the_middle(chatml: Template) -> None:
    alone = [label for label in chatml.tokenize([USER, ANSWER]).labels if label != -100]
    longer = [label for label in chatml.tokenize([USER, ANSWER, MORE, LAST]).labels if label != -100]
    assert longer[: len(alone)] == alone


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
answers = texts.filter(lambda text: not text[0].isspace())  # see the next test


@settings(max_examples=150)
@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=4), st.none() | texts)
def test_whatever_is_written_the_trained_tokens_are_the_answers(
    chatml: Template, exchanges: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokens = chatml.tokenize(messages)
    expected = "".join(f"{answer}<|im_end|>" for _, answer in exchanges)
    trained = [token for token, learnt in zip(tokens.input_ids, tokens.trained, strict=True) if learnt]
    assert chatml.tokenizer.decode(trained) == chatml.tokenizer.decode(
        chatml.tokenizer(expected, add_special_tokens=False)["input_ids"]
    )


def test_a_blank_that_shares_a_token_with_the_header_is_not_trained(chatml: Template) -> None:
    """The line break of such an answer is one token with the header's: what the model is given, it cannot learn."""
    assert trained_texts(chatml, [USER, {"role": "assistant", "content": "\n"}]) == ["<|im_end|>"]


def test_the_newline_is_left_out_even_where_the_end_of_turn_is_not_the_models_eos(dressed: Dressed) -> None:
    template = dressed(eos_token="<|endoftext|>")
    assert trained_texts(template, [USER, ANSWER, MORE, LAST]) == ["Hello!<|im_end|>", "Now it is 12345.<|im_end|>"]


# --- tool calls ---


def test_a_template_that_cannot_render_calls_gets_them_as_text_everywhere(chatml: Template) -> None:
    assert not chatml.renders_tool_calls
    assert chatml.notices([Conversation("f", 1, [USER, CALL]), Conversation("f", 2, [USER, ANSWER])]) == [
        "The template renders no tool calls: they are written as text, tool_call: NAME (1 rows)."
    ]
    assert chatml.notices([Conversation("f", 2, [USER, ANSWER])]) == []
    text = 'tool_call: set_timer\narguments: {"minutes": 5, "what": "tea ü"}<|im_end|>'
    assert trained_texts(chatml, [USER, CALL]) == [text]
    assert trained_texts(chatml, [USER, {**CALL, "content": "Gladly."}]) == [f"Gladly.\n\n{text}"]
    two = {**CALL, "tool_calls": CALL["tool_calls"] * 2}  # type: ignore[operator]
    assert trained_texts(chatml, [USER, two])[0].count("tool_call: set_timer") == 2
    assert "tool_call: set_timer" in chatml.render([USER, CALL, {"role": "tool", "content": "ok"}])


def test_arguments_that_are_kept_as_text_stay_as_they_are(chatml: Template) -> None:
    broken = {"role": "assistant", "content": None,
              "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": '}}]}  # fmt: skip
    assert trained_texts(chatml, [USER, broken]) == ['tool_call: f\narguments: {"a": <|im_end|>']


def test_a_template_that_renders_calls_keeps_its_own_form(dressed: Dressed) -> None:
    template = dressed(HERMES)
    assert template.renders_tool_calls
    rendered = trained_texts(template, [USER, {**CALL, "content": "Gladly."}])[0]
    assert rendered.startswith('Gladly.<tool_call>{"name": "set_timer"') and "tool_call: " not in rendered
    assert json.loads(rendered.split("<tool_call>")[1].split("</tool_call>")[0])["arguments"]["minutes"] == 5


def test_the_rows_tools_are_shown_to_the_model_and_not_trained(dressed: Dressed) -> None:
    tools = [{"type": "function", "function": {"name": "lay_table", "parameters": {}}}]
    ledger = tokenize_rows(dressed(HERMES), [row(USER, ANSWER, tools=tools)], "sft", max_length=500)
    example = ledger.examples[0]
    decode = dressed(HERMES).tokenizer.decode
    assert "lay_table" in decode(example.prompt_ids) and decode(example.completion_ids) == "Hello!<|im_end|>"


# --- families and templates that cannot be used ---


def test_mistrals_family_template_marks_the_answers(dressed: Dressed) -> None:
    template = dressed(MISTRAL_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>")
    conversation = [SYSTEM, USER, ANSWER, MORE, LAST]
    assert template.tokenizer.decode(template.tokenize(conversation).input_ids) == (
        "<|im_start|>[INST] Be brief.\n\nHi there [/INST] Hello!<|im_end|>"
        "[INST] And now? [/INST] Now it is 12345.<|im_end|>"
    )
    assert trained_texts(template, conversation) == [" Hello!<|im_end|>", " Now it is 12345.<|im_end|>"]
    assert trained_texts(template, [USER, CALL]) == [
        ' tool_call: set_timer\narguments: {"minutes": 5, "what": "tea ü"}<|im_end|>'
    ]


def test_llama_2s_family_template_marks_the_answers(dressed: Dressed) -> None:
    template = dressed(LLAMA2_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>")
    conversation = [SYSTEM, USER, ANSWER, MORE, LAST]
    assert template.tokenizer.decode(template.tokenize(conversation).input_ids) == (
        "<|im_start|>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello! <|im_end|>"
        "<|im_start|>[INST] And now? [/INST] Now it is 12345. <|im_end|>"
    )
    assert trained_texts(template, conversation) == [" Hello! <|im_end|>", " Now it is 12345. <|im_end|>"]


def test_a_base_model_gets_its_familys_template_by_its_config_and_another_gets_none(
    tokenizer: Any, tmp_path: Path
) -> None:
    assert family_template({"model_type": "mistral"}) == MISTRAL_TEMPLATE
    assert family_template({"model_type": "llama", "vocab_size": 32000}) == LLAMA2_TEMPLATE
    assert family_template({"model_type": "llama", "vocab_size": 128256}) is None
    bare = copy.deepcopy(tokenizer)
    assert set_template(bare, "auto", {"model_type": "mistral"}) == "the tokenizer's own"
    bare.chat_template = None
    assert set_template(bare, "auto", {"model_type": "mistral"}) == "the family's, mistral"
    bare.chat_template = None
    assert set_template(bare, "auto", {"model_type": "gpt2"}) == "none"
    with pytest.raises(FinetuiError, match="no chat template"):
        Template.of(bare)
    (tmp_path / "mine.jinja").write_text(HERMES)
    assert set_template(bare, str(tmp_path / "mine.jinja"), {}) == f"file {tmp_path / 'mine.jinja'}"
    assert Template.of(bare).renders_tool_calls
    with pytest.raises(FinetuiError, match="cannot be read"):
        set_template(bare, str(tmp_path / "none.jinja"), {})


@pytest.mark.parametrize("jinja", [NO_SYSTEM, IGNORES_SYSTEM], ids=["raises", "ignores"])
def test_a_template_without_a_system_turn_gets_its_text_before_the_next_user_turn(dressed: Dressed, jinja: str) -> None:
    template = dressed(jinja)
    assert not template.takes_system
    assert "no system turn" in template.notices([Conversation("f", 1, [SYSTEM, USER, ANSWER])])[0]
    tokens = template.tokenize([SYSTEM, USER, ANSWER])
    assert "user\nBe brief.\n\nHi there<|im_end|>" in template.tokenizer.decode(tokens.input_ids)
    assert trained_texts(template, [SYSTEM, USER, ANSWER]) == ["Hello!<|im_end|>"]


def test_system_text_that_no_user_turn_can_take_is_not_dropped_unsaid(dressed: Dressed) -> None:
    ledger = tokenize_rows(
        dressed(NO_SYSTEM), [row(USER, ANSWER), row(USER, ANSWER, SYSTEM, LAST)], "sft", max_length=500
    )
    assert len(ledger.examples) == 1
    assert "no system turn" in ledger.left_out[0][1]


def test_rows_whose_earlier_turns_a_template_rewrites_are_left_out_by_name(dressed: Dressed) -> None:
    template = dressed(REWRITES)
    rows = [row(USER, ANSWER), row(USER, ANSWER, MORE, LAST, line=2)]
    ledger = tokenize_rows(template, rows, "sft", max_length=500)
    assert [example.row.line for example in ledger.examples] == [1]
    assert [(left.line, "rewrites earlier turns" in reason) for left, reason in ledger.left_out] == [(2, True)]
    with pytest.raises(FinetuiError, match="No row is left after tokenising: the chat template rewrites earlier turns"):
        tokenize_rows(template, rows[1:], "sft", max_length=500)


def test_a_template_whose_opening_is_not_what_the_answer_begins_with_is_refused(dressed: Dressed) -> None:
    with pytest.raises(FinetuiError, match="cannot be masked: the chat template rewrites earlier turns"):
        dressed(NO_SYSTEM.removesuffix("{% endif %}") + "<think>{% endif %}")


@pytest.mark.parametrize("jinja", ["{{ raise_exception('never') }}", "{% for", "{{ nothing.at.all }}", "{{ 1 / 0 }}"])
def test_a_template_that_cannot_render_is_refused_in_one_sentence(dressed: Dressed, jinja: str) -> None:
    with pytest.raises(FinetuiError) as caught:
        dressed(jinja)
    assert "cannot be masked" in caught.value.message and "\n" not in caught.value.message


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(FinetuiError, match="no fast tokenizer"):
        Template.of(ByT5Tokenizer())


def test_a_row_that_the_template_refuses_is_left_out_with_its_words(dressed: Dressed) -> None:
    jinja = NO_SYSTEM.replace("m.role == 'system'", "m.content == 'forbidden'")
    rows = [row(USER, ANSWER), row({"role": "user", "content": "forbidden"}, ANSWER, line=2)]
    ledger = tokenize_rows(dressed(jinja), rows, "sft", max_length=500)
    assert [(left.line, reason) for left, reason in ledger.left_out] == [
        (2, "the chat template refuses it: no system turn here")
    ]


# --- length ---

SHORT = row(USER, ANSWER, line=1, label=True)
LONG = row({"role": "user", "content": "word " * 100}, ANSWER, line=2, label=False)
TALKATIVE = row(USER, {"role": "assistant", "content": "word " * 100}, line=3, label=False)


def test_long_rows_are_dropped_by_name_unless_asked_otherwise(chatml: Template) -> None:
    ledger = tokenize_rows(chatml, [SHORT, LONG, TALKATIVE], "sft", max_length=60)
    assert [example.row.line for example in ledger.examples] == [1]
    assert [(left.line, reason) for left, reason in ledger.left_out] == [
        (2, "longer than the limit"),
        (3, "longer than the limit"),
    ]
    assert ledger.cut == []


def test_cut_keeps_the_end_of_an_sft_row_and_says_how_much_went(chatml: Template) -> None:
    ledger = tokenize_rows(chatml, [SHORT, LONG, TALKATIVE], "sft", max_length=60, too_long="cut")
    assert [len(example.tokens.input_ids) for example in ledger.examples][1:] == [60, 60]
    whole = chatml.tokenize(LONG.messages)
    assert ledger.examples[1].tokens.input_ids == whole.input_ids[-60:]
    assert ledger.examples[1].tokens.trained == whole.trained[-60:]
    assert [(row.line, gone) for row, gone in ledger.cut][0] == (2, len(whole.input_ids) - 60)
    assert ledger.left_out == []


def test_cut_keeps_the_whole_answer_of_a_kto_row_or_leaves_it_out(chatml: Template) -> None:
    ledger = tokenize_rows(chatml, [SHORT, LONG, TALKATIVE], "kto", max_length=80, max_prompt_length=40, too_long="cut")
    cut = next(example for example in ledger.examples if example.row.line == 2)
    assert len(cut.prompt_ids) == 40 and chatml.tokenizer.decode(cut.completion_ids) == "Hello!<|im_end|>"
    assert [(left.line, reason) for left, reason in ledger.left_out] == [(3, "longer than the limit")]
    dropped = tokenize_rows(chatml, [SHORT, LONG], "kto", max_length=500, max_prompt_length=60)
    assert [left.line for left, _ in dropped.left_out] == [2]


def test_a_kto_row_keeps_at_least_one_token_of_its_prompt(chatml: Template) -> None:
    answer = len(Example(SHORT, chatml.tokenize(SHORT.messages, only_last=True)).completion_ids)
    talk = len(Example(TALKATIVE, chatml.tokenize(TALKATIVE.messages, only_last=True)).completion_ids)
    assert answer < talk
    for limit, kept in ((talk, [1]), (talk + 1, [1, 3])):
        ledger = tokenize_rows(
            chatml, [SHORT, TALKATIVE], "kto", max_length=limit, max_prompt_length=99, too_long="cut"
        )
        assert [example.row.line for example in ledger.examples] == kept
    assert len(ledger.examples[1].prompt_ids) == 1


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_refuse_names_the_first_row_that_is_too_long(chatml: Template, method: str) -> None:
    with pytest.raises(FinetuiError, match=r"rows.jsonl, line 2: \d+ tokens, over the limit of 60"):
        tokenize_rows(chatml, [SHORT, LONG], method, max_length=60, too_long="refuse")


@pytest.mark.parametrize("method", ["sft", "kto"])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_a_limit_that_leaves_nothing_is_refused(chatml: Template, method: str, too_long: str) -> None:
    rows = [row(USER, ANSWER, MORE, label=True)] if method == "sft" else [TALKATIVE]
    with pytest.raises(FinetuiError, match="No row is left after tokenising: longer than the limit"):
        tokenize_rows(chatml, rows, method, max_length=8, too_long=too_long)


def test_a_cut_row_without_a_target_is_left_out(chatml: Template) -> None:
    """The first place is never a target: a row cut so that only its first token is trained would train nothing."""
    conversation = row(USER, ANSWER, MORE)
    tokens = chatml.tokenize(conversation.messages)
    last = len(tokens.trained) - tokens.trained[::-1].index(True)
    length = len(tokens.input_ids) - last + 1
    ledger = tokenize_rows(chatml, [SHORT, conversation], "sft", max_length=max(length, 8), too_long="cut")
    assert all(any(label != -100 for label in example.tokens.labels) for example in ledger.examples)
    assert len(ledger.examples) + len(ledger.left_out) == 2


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.integers(8, 90),
    st.integers(4, 90),
    st.sampled_from(["drop", "cut"]),
    st.sampled_from(["sft", "kto"]),
)
def test_kept_and_left_out_rows_add_up_and_none_is_over_the_limit(
    chatml: Template, lengths: list[int], limit: int, prompt_limit: int, too_long: str, method: str
) -> None:
    rows = [row({"role": "user", "content": "a " * (length + 1)}, ANSWER, line=n) for n, length in enumerate(lengths)]
    try:
        ledger = tokenize_rows(
            chatml, rows, method, max_length=limit, max_prompt_length=min(prompt_limit, limit), too_long=too_long
        )
    except FinetuiError:
        return
    assert sorted([e.row.line for e in ledger.examples] + [left.line for left, _ in ledger.left_out]) == list(
        range(len(rows))
    )
    assert ledger.tokens == sum(len(example.tokens.input_ids) for example in ledger.examples)
    for example in ledger.examples:
        assert len(example.tokens.input_ids) <= limit and any(label != -100 for label in example.tokens.labels)
        if method == "kto":
            assert 0 < len(example.prompt_ids) <= prompt_limit
            assert chatml.tokenizer.decode(example.completion_ids) == "Hello!<|im_end|>"


def test_tokenising_says_how_far_it_is(chatml: Template) -> None:
    seen: list[tuple[int, int]] = []
    tokenize_rows(chatml, [SHORT] * 401, "sft", max_length=100, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 401), (200, 401), (400, 401)]
