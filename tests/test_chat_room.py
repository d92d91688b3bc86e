"""Trying a run's models: the child that talks, and the room in the app."""

import json
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeNamed, Refused
from pilots import CONTROLS, HOSTILE, frame, shows, until

from core.evaluate_model import Answerer
from core.runs import Run
from core.talk import Talk
from tui.app import FinetuiApp
from tui.chat import ChatScreen, Reply, Setting, SettingScreen, Turn, messages_of, reply_words

HELLO = [{"role": "user", "content": "Set a timer for 3 minutes"}]


class Conversation:
    """A child that talks, and what it said."""

    def __init__(self, run: Run) -> None:
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.talk = Talk(run, self.said.put)

    def next(self, event: str, limit: float = 90) -> dict[str, Any]:
        """Wait for an event of this kind; what comes before it is passed over."""
        while (found := self.said.get(timeout=limit))["event"] != event:
            assert found["event"] != "error" or event == "error", found
        return found

    def answer(self, number: int) -> tuple[str, dict[str, Any]]:
        """The whole text of an answer and how it ended."""
        text = ""
        while True:
            found = self.said.get(timeout=90)
            if found.get("id") == number:
                if found["event"] != "text":
                    return text, found
                text += found["text"]


@pytest.fixture
def converse() -> Iterator[Callable[[Run], Conversation]]:
    opened: list[Conversation] = []

    def open_one(run: Run) -> Conversation:
        opened.append(Conversation(run))
        return opened[-1]

    yield open_one
    for one in opened:
        one.talk.close()


def test_models_stream_what_an_evaluation_would_answer_and_stop_when_asked(
    chain: Run, converse: Callable[[Run], Conversation]
) -> None:
    child = converse(chain)
    assert child.next("ready")["variants"] == ["base", "sft", "kto"]
    prompts = child.next("prompts")["prompts"]
    assert len(prompts) == 3 and prompts[0]["user"].startswith("Set a timer")
    answerer = Answerer.load(chain, chain.plan(), print)
    for number, variant in enumerate(("base", "kto"), 1):
        child.talk.say(number, variant, HELLO, None, max_new_tokens=12, temperature=0.0)
        text, end = child.answer(number)
        with answerer.using(next(one for one in answerer.variants if one.name == variant)):
            [expected] = answerer.answers([answerer.template.render(HELLO)], 12)
        assert text == expected.text and end["tokens"] >= expected.tokens
        assert end["reason"] == ("length" if expected.cut else "end")

    for number in (3, 4):
        child.talk.say(number, "base", HELLO, None, max_new_tokens=3000, temperature=1.0)
    child.next("text")
    child.talk.stop()
    ends = {found["id"]: found for found in (child.next("end"), child.next("end"))}
    assert {number: end["reason"] for number, end in ends.items()} == {3: "stopped", 4: "stopped"}
    child.talk.say(5, "base", HELLO, None, max_new_tokens=2, temperature=0.0)
    assert child.answer(5)[1]["event"] == "end", "it answers after a stop as before"
    child.talk.say(6, "base", [{"role": "user", "content": "x " * 9000}], None, max_new_tokens=2, temperature=0.0)
    assert "takes 4096" in child.answer(6)[1]["message"]
    process = psutil.Process(child.talk.pid)
    child.talk.close()
    assert not process.is_running()


def test_the_child_ends_with_the_app_however_that_ends(chain: Run) -> None:
    """Its standard input is closed while it writes: nobody is there any more."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "core.evaluate_chat", str(chain.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdin and child.stdout
    request = {"do": "say", "id": 1, "variant": "base", "messages": HELLO, "max_new_tokens": 4000, "temperature": 1.0}
    child.stdin.write(json.dumps(request).encode() + b"\nnonsense\n")
    child.stdin.flush()
    assert any(b'"text"' in line for line in child.stdout)
    child.stdin.close()
    assert child.wait(60) == 0
    child.stdout.close()


def test_a_run_without_a_model_and_a_child_that_dies_are_told(
    named: MakeNamed, chain: Run, converse: Callable[[Run], Conversation]
) -> None:
    assert "no model yet" in converse(named("empty")).next("error")["message"]
    child = converse(chain)
    psutil.Process(child.talk.pid).kill()
    found = child.next("error")
    assert found["id"] is None and "has ended" in found["message"]


def test_chat_needs_a_model_and_a_terminal(refused: Refused, chain: Run, named: MakeNamed) -> None:
    assert "no model yet" in refused("chat", named("empty").name)
    assert "needs a terminal" in refused("chat", chain.name)


def test_each_model_has_its_own_side_of_the_conversation() -> None:
    setting = Setting(({"role": "system", "content": "Be brief."},))
    turns = [
        Turn("user", "one", {"kto": Reply(1, "K"), "base": Reply(2, "B")}),
        Turn("tool", "two", {"kto": Reply(3, "K2")}), Turn("user", "three"),
    ]  # fmt: skip
    for variant, answers in (("kto", ["K", "K2"]), ("base", ["B", "K2"])):
        said = [message["content"] for message in messages_of(setting, turns, variant)]
        assert said == ["Be brief.", "one", answers[0], "two", answers[1], "three"]
    assert setting.system == "Be brief."


def test_an_answer_shows_its_calls_and_what_the_schema_says_of_them() -> None:
    tools = ({"name": "boil", "parameters": {"required": ["litres"]}},)
    reply = Reply(1, 'tool_call: boil\narguments: {"litres": 1}', "9 tokens", done=True)
    assert "✔ call: boil" in reply_words("kto", reply, Setting(tools=tools)).plain
    reply.text = "tool_call: boil\narguments: {}"
    assert "✘ call: boil: 'litres' is a required property" in reply_words("kto", reply, Setting(tools=tools)).plain
    assert "✔ call: boil" in reply_words("kto", reply, Setting()).plain
    reply.text = HOSTILE
    assert not CONTROLS.search(reply_words("kto", reply, Setting()).plain)


@pytest.mark.usefixtures("own_cache_and_no_gpu")
async def test_a_conversation_in_the_app_whose_window_grows(chain: Run, folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "chain")
        await pilot.press("i")
        screen = await until(pilot, lambda: isinstance(app.screen, ChatScreen) and app.screen)
        await shows(pilot, "after KTO beside base model")
        await until(pilot, lambda: screen.prompts)
        await pilot.press("up")
        assert screen.query_one("#line").value == screen.prompts[0]["user"]
        screen.setting = Setting(max_new_tokens=6)
        await pilot.press("enter")
        await until(pilot, lambda: screen.turns and screen.turns[0].replies and not screen.writing)
        for size in ((80, 24), (120, 40)):
            await pilot.resize_terminal(*size)
            text = await shows(pilot, "after KTO", "base model", "6 tokens")
            assert not CONTROLS.search(text) and screen.prompts[0]["user"][:20] in text
        first = screen.turns[0].replies["kto"].number
        await pilot.press("f5")
        await until(pilot, lambda: screen.turns[0].replies.get("kto", Reply(0)).number > first and not screen.writing)
        screen.setting = Setting(max_new_tokens=3000, temperature=1.0)
        screen.query_one("#line").value = "/tool done"
        await pilot.press("enter")
        for _ in range(9):  # a model of random weights may have ended by itself before the key
            await until(pilot, lambda: len(screen.turns) == 2 and screen.turns[1].replies.get("kto", Reply(0)).text)
            if screen.writing:
                await pilot.press("escape")
            await until(pilot, lambda: not screen.writing)
            if screen.turns[1].replies["kto"].note.endswith("stopped"):
                break
            await pilot.press("f5")
        assert screen.turns[1].role == "tool" and screen.turns[1].replies["kto"].note.endswith("stopped")
        await pilot.press("f3", "f6")
        assert screen.turns == [] and screen.other == "sft"
        child = psutil.Process(screen._talk.pid)
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is not screen)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("own_cache_and_no_gpu")
async def test_system_prompt_and_tools_are_checked_when_they_are_taken(folder: Path, folder_made: None) -> None:
    app = FinetuiApp(folder)
    taken: list[Setting | None] = []
    async with app.run_test(size=(80, 24)) as pilot:
        app.push_screen(SettingScreen(Setting()), taken.append)
        screen = await until(pilot, lambda: app.screen.query("#wrong") and app.screen)
        for tools, said in (("{", "no JSON"), ('[{"name": "x", "parameters": {"type": "strnig"}}]', "cannot be used")):
            screen.query_one("#tools").text = tools
            await pilot.press("ctrl+s")
            await shows(pilot, said)
        screen.query_one("#tools").text = '[{"name": "boil"}]'
        screen.query_one("#system").text = "Be brief."
        screen.query_one("#temperature").value = "warm"
        await pilot.press("ctrl+s")
        await shows(pilot, "are numbers")
        screen.query_one("#temperature").value = "0.5"
        assert "system prompt" in frame(app).lower()
        await pilot.press("ctrl+s")
        await until(pilot, lambda: taken)
    assert taken[0] == Setting(({"role": "system", "content": "Be brief."},), ({"name": "boil"},), 0.5, 300)
