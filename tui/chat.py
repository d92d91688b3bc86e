"""Try it: a conversation with a run's model, the base or another of its models beside. Leaving frees the memory."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input, TextArea

from core.errors import FinetuiError
from core.evaluation import variant_words
from core.runs import Run
from core.talk import Heard, Talk
from core.text import clean, number
from core.toolcalls import read_calls
from core.tools import Tool, call_fault, tools_of
from tui.widgets import Banner, Line, Room, Words, keys

MAX_SHOWN = 20_000
TOOL_COMMAND = "/tool "
REGENERATE_AT = 0.7
PROMPTS_SHOWN = 8
ENDINGS = {"length": "cut at the limit", "stopped": "stopped"}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What a conversation goes by: what stands before it, the tools there are, how answers are written."""

    before: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    temperature: float = 0.0
    max_new_tokens: int = 300

    @property
    def system(self) -> str:
        return "\n\n".join(str(m["content"]) for m in self.before if m["role"] == "system")

    @property
    def schemas(self) -> dict[str, Tool]:
        return tools_of(list(self.tools)) if self.tools else {}


@dataclass
class Reply:
    """One model's answer as it comes."""

    number: int
    text: str = ""
    note: str = "…"
    done: bool = False


@dataclass
class Turn:
    """What the person (or a tool) said, and what each model answered."""

    role: str
    text: str
    replies: dict[str, Reply] = field(default_factory=dict)


def messages_of(setting: Setting, turns: Sequence[Turn], variant: str) -> Messages:
    """The conversation as `variant` has had it; where it was not asked, with the other model's answer."""
    messages: Messages = [dict(message) for message in setting.before]
    for turn in turns:
        messages.append({"role": turn.role, "content": turn.text})
        reply = turn.replies.get(variant) or next(iter(turn.replies.values()), None)
        if reply is not None and turn is not turns[-1]:
            messages.append({"role": "assistant", "content": reply.text or "-"})
    return messages


class SettingScreen(ModalScreen[Setting | None]):
    """System prompt, tools as JSON, temperature and length; ctrl+s takes them, Escape leaves them."""

    BINDINGS = [Binding("ctrl+s", "take", "Take"), Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._setting = setting

    def compose(self) -> ComposeResult:
        tools = json.dumps(list(self._setting.tools), indent=1, ensure_ascii=False) if self._setting.tools else ""
        with Vertical(classes="dialog -wide-dialog"):
            yield Words(Content.styled("System prompt", "bold"))
            yield TextArea(clean(self._setting.system, 100_000, newlines=True), id="system", compact=True)
            yield Words(Content.styled("Tools, a JSON list (empty: none)", "bold"))
            yield TextArea(clean(tools, 100_000, newlines=True), id="tools", compact=True)
            yield Words(Content.styled("Temperature (0: the likeliest token) and longest answer in tokens", "bold"))
            with Horizontal(classes="answers"):
                yield Input(number(self._setting.temperature), id="temperature", compact=True)
                yield Input(str(self._setting.max_new_tokens), id="length", compact=True)
            yield Words(id="wrong")
            yield Words(keys(("ctrl+s", "take"), ("Tab", "next field"), ("Escape", "cancel")))

    def action_take(self) -> None:
        try:
            self.dismiss(self._read())
        except FinetuiError as error:
            words = Content.assemble((clean(error.message, 300), "$text-error"), f" {clean(error.advice, 200)}")
            self.query_one("#wrong", Words).say(words)

    def _read(self) -> Setting:
        """What was typed. Raises FinetuiError."""
        tools = self.query_one("#tools", TextArea).text.strip()
        found = json.loads(tools) if tools and tools_of(tools) else []
        for tool in tools_of(found).values() if found else ():
            tool.refuse_broken()
        try:
            temperature = float(self.query_one("#temperature", Input).value or 0)
            length = int(self.query_one("#length", Input).value)
        except ValueError:
            raise FinetuiError("Temperature and length are numbers.", "For example 0.7 and 300.") from None
        if not (0 <= temperature <= 5 and 1 <= length <= 100_000):
            raise FinetuiError("The temperature lies between 0 and 5, the length above 0.", "For example 0.7 and 300.")
        system = self.query_one("#system", TextArea).text.strip()
        before: tuple[dict[str, Any], ...] = ({"role": "system", "content": system},) if system else ()
        if system == self._setting.system:
            before = self._setting.before
        return Setting(before, tuple(found["tools"] if isinstance(found, dict) else found), temperature, length)


class Say(Line):
    """The line to talk into."""

    BINDINGS = [Binding("enter", "submit", "Send")]


class ChatScreen(Room[None]):
    """A conversation. The models live in a child process, which ends when this screen is left."""

    BINDINGS = [
        Binding("escape", "halt", "Stop or leave", key_display="esc"),
        Binding("up", "prompt(1)", "Held-out prompt", key_display="↑"),
        Binding("f2", "setting", "System, tools"),
        Binding("f3", "beside", "Beside"),
        Binding("f5", "again", "Again"),
        Binding("f6", "anew", "New"),
        Binding("f4", "model", "Another model of the run", show=False),
        Binding("down", "prompt(-1)", "Prompt before", show=False),
        Binding("pageup", "scroll(-1)", "Up", show=False),
        Binding("pagedown", "scroll(1)", "Down", show=False),
        Binding("f1", "app.help", "Help"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]

    class Said(Message):
        """The child has said something; it waits in the inbox."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self.place = f"try {run.name}"
        self.setting = Setting()
        self.turns: list[Turn] = []
        self.variants: list[str] = []
        self.main, self.other = "", ""
        self.prompts: list[dict[str, Any]] = []
        self.prompt_at = -1
        self.state = "starting the model's process …"
        self.failed = False
        self._talk: Talk | None = None
        self._count = 0
        self._inbox: list[Heard] = []
        self._lock = threading.Lock()
        self._told = False

    def body(self) -> ComposeResult:
        yield Words(id="setting")
        with VerticalScroll(id="talk", can_focus=False):
            yield Words(id="hint")
        yield Say("", placeholder="say something; ↑ takes a held-out prompt; /tool … answers a call", id="line")

    def on_mount(self) -> None:
        self.query_one("#line").focus()
        self._talk = Talk(self.run_shown, self.heard)
        self.paint()

    def on_unmount(self) -> None:
        if self._talk:
            self._talk.close()

    def heard(self, said: Heard) -> None:
        """In the listener's thread: keep it; the screen looks when it gets to it, however much has come by then."""
        with self._lock:
            self._inbox.append(said)
            told, self._told = self._told, True
        if not told:
            self.post_message(self.Said())

    @on(Said)
    def said(self) -> None:
        with self._lock:
            said, self._inbox, self._told = self._inbox, [], False
        for one in said:
            self.take(one)
        self.paint()

    def take(self, said: Heard) -> None:
        """Take one word of the child in."""
        event = said.get("event")
        if event == "loading":
            self.state = clean(said.get("text", ""), 100)
        elif event == "ready":
            self.variants = [str(name) for name in said.get("variants", [])]
            self.main = self.main or self.variants[-1]
            self.other = self.variants[0] if len(self.variants) > 1 else ""
            self.state = "ready"
        elif event == "prompts":
            self.prompts = list(said.get("prompts", []))
            if self.prompts and not self.turns and self.setting == Setting():
                first = self.prompts[0]
                systems = tuple(message for message in first["before"] if message["role"] == "system")
                self.setting = Setting(systems, usable(first.get("tools")))
        elif (reply := self.reply(said.get("id"))) is not None:
            if event == "text":
                reply.text += str(said.get("text", ""))
            else:
                reply.done, reply.note = True, end_words(said)
        elif event == "error":
            self.failed = True
            self.state = f"✘ {clean(said.get('message', ''), 300)} {clean(said.get('advice') or '', 300)}"

    def reply(self, number: Any) -> Reply | None:
        replies = (reply for turn in self.turns for reply in turn.replies.values())
        return next((reply for reply in replies if reply.number == number), None)

    @property
    def writing(self) -> bool:
        return any(not reply.done for turn in self.turns for reply in turn.replies.values())

    def paint(self) -> None:
        """Everything on this screen is painted here; a turn's widgets are made once."""
        with self.app.batch_update():
            state = "● writing" if self.writing else "✔ ready" if self.state == "ready" else "✘" if self.failed else "○"
            self.query_one(Banner).say(state)
            self.query_one("#setting", Words).say(self.setting_words())
            hint = self.query_one("#hint", Words)
            hint.display = self.failed or not self.turns
            hint.say(self.state if self.state != "ready" else hint_words(self.prompts, self.size.width - 8))
            for place, turn in enumerate(self.turns):
                self.paint_turn(place, turn)

    def paint_turn(self, place: int, turn: Turn) -> None:
        talk = self.query_one("#talk", VerticalScroll)
        found = talk.query(f"#turn-{place}")
        if found:
            for variant, reply in turn.replies.items():
                words = found.first().query(f"#reply-{place}-{self.variants.index(variant)}")
                if words:
                    words.first(Words).say(reply_words(variant, reply, self.setting))
        else:
            who = "you" if turn.role == "user" else turn.role
            said = Words(
                Content.assemble((f"{who}  ", "bold $text-accent"), clean(turn.text, MAX_SHOWN, newlines=True))
            )
            answers = Horizontal(
                *(
                    Words(
                        reply_words(variant, reply, self.setting),
                        id=f"reply-{place}-{self.variants.index(variant)}",
                        classes="answer",
                    )
                    for variant, reply in turn.replies.items()
                ),
                classes="answers-beside",
            )
            talk.mount(Vertical(said, answers, id=f"turn-{place}", classes="turn"))
        if place == len(self.turns) - 1 and self.writing:
            talk.scroll_end(animate=False)

    def setting_words(self) -> Content:
        system = clean(self.setting.system, 300)
        system = f"{system[:38]}…" if len(system) > 39 else system or "none"
        tools = f"{len(self.setting.tools)} tools" if self.setting.tools else "no tools"
        how = f"temperature {number(self.setting.temperature)}" if self.setting.temperature else "greedy"
        models = variant_words(self.main) if self.main else "loading"
        models += f" beside {variant_words(self.other)}" if self.other else ""
        return Content.assemble(
            (clean(models, 60), "bold"), (f"   system: {system}   {tools}   {how}", "$foreground-muted")
        )

    @on(Input.Submitted, "#line")
    def submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        if text and self.state == "ready" and not self.writing and not self.failed:
            event.input.value = ""
            role = "tool" if text.startswith(TOOL_COMMAND) and self.turns else "user"
            self.turns.append(Turn(role, text.removeprefix(TOOL_COMMAND) if role == "tool" else text))
            self.ask(self.setting.temperature)

    def ask(self, temperature: float) -> None:
        """Have the chosen models answer the last turn, one after the other."""
        turn = self.turns[-1]
        for variant in filter(None, dict.fromkeys([self.main, self.other])):
            self._count += 1
            messages = messages_of(self.setting, self.turns, variant)
            turn.replies[variant] = Reply(self._count)
            if self._talk:
                self._talk.say(
                    self._count, variant, messages, list(self.setting.tools) or None,
                    max_new_tokens=self.setting.max_new_tokens, temperature=temperature,
                )  # fmt: skip
        self.paint()
        self.call_after_refresh(self.query_one("#talk", VerticalScroll).scroll_end, animate=False)

    def action_halt(self) -> None:
        """Stop what is being written; where nothing is, leave."""
        if self.writing and not self.failed and self._talk:
            self._talk.stop()
        else:
            self.dismiss(None)

    def action_again(self) -> None:
        """Answer the last turn once more; what greedy writing would only repeat is drawn at a temperature."""
        if self.turns and not self.writing and not self.failed:
            self.query_one(f"#turn-{len(self.turns) - 1}").remove()
            self.turns[-1] = Turn(self.turns[-1].role, self.turns[-1].text)
            self.call_after_refresh(self.ask, self.setting.temperature or REGENERATE_AT)

    def action_anew(self) -> None:
        if not self.writing:
            self.turns = []
            self.query(".turn").remove()
            self.paint()

    def action_beside(self) -> None:
        """Another model of the run beside, or none."""
        if self.variants and not self.writing:
            choices = ["", *(name for name in self.variants if name != self.main)]
            self.other = choices[(choices.index(self.other) + 1) % len(choices)] if self.other in choices else ""
            self.paint()

    def action_model(self) -> None:
        """Another model of the run."""
        if self.variants and not self.writing:
            self.main = self.variants[(self.variants.index(self.main) + 1) % len(self.variants)]
            self.other = "" if self.other == self.main else self.other
            self.paint()

    def action_setting(self) -> None:
        def taken(setting: Setting | None) -> None:
            if setting is not None:
                self.setting = setting
                self.paint()

        self.app.push_screen(SettingScreen(self.setting), taken)

    def action_prompt(self, by: int) -> None:
        """Put a held-out prompt into the line, with what stood before it."""
        if not self.prompts or self.writing:
            return
        self.prompt_at = (self.prompt_at + by) % len(self.prompts)
        chosen = self.prompts[self.prompt_at]
        line = self.query_one("#line", Line)
        line.value = clean(chosen["user"], MAX_SHOWN)
        line.cursor_position = len(line.value)
        if not self.turns:
            setting = self.setting
            self.setting = Setting(
                tuple(chosen["before"]), usable(chosen.get("tools")), setting.temperature, setting.max_new_tokens
            )
            self.paint()

    def action_scroll(self, by: int) -> None:
        talk = self.query_one("#talk", VerticalScroll)
        talk.scroll_relative(y=by * max(1, talk.size.height - 2), animate=False)


def usable(tools: Any) -> tuple[dict[str, Any], ...]:
    """A row's tools where they are tools, else none."""
    try:
        return tuple(tools) if tools and tools_of(tools) else ()
    except FinetuiError:
        return ()


def hint_words(prompts: Sequence[dict[str, Any]], width: int) -> Content:
    """What can be done here, and the first held-out prompts."""
    how = "Answers stream as they are written; Escape stops them. Leaving frees the memory of the model."
    if not prompts:
        return Content(how)
    lines = [clean(prompt.get("user", ""), 200) for prompt in prompts[:PROMPTS_SHOWN]]
    lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    more = f"\n  and {len(prompts) - PROMPTS_SHOWN} more" if len(prompts) > PROMPTS_SHOWN else ""
    return Content.assemble(
        how, "\n\n", ("↑ puts a held-out prompt into the line, with its system prompt and tools:", "bold"), "\n",
        ("\n".join(f"  {line}" for line in lines) + more, "$foreground-muted"),
    )  # fmt: skip


def end_words(said: Heard) -> str:
    """How an answer ended, its length and pace; or what went wrong."""
    if said.get("event") == "error":
        return f"✘ {clean(said.get('message', ''), 300)} {clean(said.get('advice') or '', 200)}".rstrip()
    tokens, seconds = said.get("tokens") or 0, said.get("seconds") or 0
    pace = f", {number(tokens / seconds, 2)} a second" if seconds else ""
    ending = ENDINGS.get(str(said.get("reason")), "")
    return f"{tokens} tokens{pace}" + (f", {ending}" if ending else "")


def reply_words(variant: str, reply: Reply, setting: Setting) -> Content:
    """A model's answer, what calls it holds, and how it ended."""
    text = clean(reply.text.strip(), MAX_SHOWN, newlines=True)
    parts: list[Any] = [(variant_words(variant), "bold $foreground-muted"), "\n", text]
    if reply.done:
        for call in read_calls(reply.text).calls:
            fault = (
                call_fault(call, setting.schemas) if setting.tools else "" if call.well_formed else "not well-formed"
            )
            name = clean(call.name, 60) or "without a name"
            hue = "$text-error" if fault else "$text-success"
            parts.append((f"\n{'✘' if fault else '✔'} call: {name}{f': {clean(fault, 200)}' if fault else ''}", hue))
    return Content.assemble(*parts, "\n", (reply.note, "$foreground-muted"))
