"""A Modelfile for Ollama: its Go template where the chat template is one whose twin is known, and the stop tokens.

Which family a template belongs to is not guessed from names: a conversation is rendered by the tokenizer and by the
family's own rule, and only equal text counts. Without a twin Ollama looks at the GGUF's own template itself.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM, ASKED, ANSWERED, AGAIN = "finetui-system", "finetui-asked", "finetui-answered", "finetui-again"
PROBE = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWERED},
    {"role": "user", "content": AGAIN},
]


@dataclass(frozen=True)
class Family:
    """How a family writes a conversation: as Ollama's template, and the same as a function of system and turns."""

    go: str
    stops: tuple[str, ...]
    render: Callable[[str, str, str, str], str]


# The system prompt goes into the first user turn; no space stands behind [/INST], where the model's own begins.
_INST = (
    '{{{{- $system := "" }}}}{{{{- range .Messages }}}}{{{{- if eq .Role "system" }}}}{{{{- $system = .Content }}}}'
    '{{{{- else if eq .Role "user" }}}}[INST] {{{{ if $system }}}}{system}{{{{ end }}}}{{{{ $system = "" }}}}'
    '{{{{ .Content }}}} [/INST]{{{{- else if eq .Role "assistant" }}}} {{{{ .Content }}}}{end}'
    "{{{{- end }}}}{{{{- end }}}}"
)
FAMILIES = {
    "ChatML": Family(
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        ("<|im_end|>",),
        lambda system, first, answer, then: (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{first}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n{then}<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "Mistral [INST]": Family(
        _INST.format(system="{{ $system }}\n\n", end="</s>"),
        ("</s>", "[INST]"),
        lambda system, first, answer, then: (
            f"[INST] {system}\n\n{first} [/INST] {answer}</s>[INST] {then} [/INST]"
        ),
    ),
    "Llama 2 [INST]": Family(
        _INST.format(system="<<SYS>>\n{{ $system }}\n<</SYS>>\n\n", end=" </s><s>"),
        ("</s>", "[INST]"),
        lambda system, first, answer, then: (
            f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{first} [/INST] {answer} </s><s>[INST] {then} [/INST]"
        ),
    ),
    "Llama 3": Family(
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>",),
        lambda system, first, answer, then: "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{words}<|eot_id|>"
            for role, words in (("system", system), ("user", first), ("assistant", answer), ("user", then))
        )
        + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}  # fmt: skip


def family_of(tokenizer: Any) -> str:
    """The family whose rule gives the very text of the tokenizer's template; empty for none."""
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a foreign program
        return ""
    text = text.removeprefix(tokenizer.bos_token or "")  # llama.cpp puts it in front by itself
    for name, family in FAMILIES.items():
        if family.render(SYSTEM, ASKED, ANSWERED, AGAIN).removeprefix(tokenizer.bos_token or "") == text:
            return name
    return ""


def own_system(tokenizer: Any) -> str:
    """The system prompt that a ChatML template adds where a conversation has none; empty for none."""
    try:
        text = tokenizer.apply_chat_template(PROBE[1:2], tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a foreign program
        return ""
    before, mark, rest = text.partition("<|im_start|>system\n")
    return rest.partition("<|im_end|>")[0] if mark and not before else ""


def modelfile(file: str, tokenizer: Any, context: int, name: str) -> str:
    """The Modelfile for `file`, which lies beside it."""
    family = family_of(tokenizer)
    lines = [
        f"# ollama create {shlex.quote(name.lower())} -f Modelfile && ollama run {shlex.quote(name.lower())}",
        f"FROM ./{file}",
    ]
    if family:
        lines += [f"# {family}, the template it was trained with", f'TEMPLATE """{FAMILIES[family].go}"""']
    else:
        lines.append("# No TEMPLATE: Ollama reads the one inside the GGUF file, and says so if it does not know it.")
    if family == "ChatML" and (system := own_system(tokenizer)) and '"""' not in system:
        lines += ["# what its template says where nothing else is said", f'SYSTEM """{system}"""']
    stops = FAMILIES[family].stops if family else (tokenizer.eos_token,)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop]
    lines += [
        f"PARAMETER num_ctx {context}",
        "# greedy, as it was checked; raise it for variety",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def commands(file: Path, name: str, context: int) -> dict[str, str]:
    """The exact commands that serve a file: with llama.cpp's server (an OpenAI API) and with Ollama."""
    quoted, folder = shlex.quote(str(file)), shlex.quote(str(file.parent))
    return {
        "llama.cpp": f"llama-server -m {quoted} -c {context} --jinja --port 8080",
        "ollama": f"cd {folder} && ollama create {shlex.quote(name.lower())} -f Modelfile && "
        f"ollama run {shlex.quote(name.lower())}",
    }
