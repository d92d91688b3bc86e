"""The app: it opens home, shows help, rings when a run ends, and ends when its terminal is gone.

Training never depends on it.
"""

import asyncio
import contextlib
import functools
import gc
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from textual import events, on, work
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input

from core.paths import cache_dir, replacing, runs_dir
from core.runs import NAME, Run
from core.watch import GLYPHS
from tui.dashboard import DashboardScreen
from tui.dialogs import Ended, HelpScreen
from tui.home import HomeScreen
from tui.widgets import HUES, Banner

LOOK_AT_TERMINAL_S = 1.0
LEAVE_S = 5.0
"""How long the app has to leave in order once its terminal is gone."""
EXIT_LOST_TERMINAL = 129
SETTLE_S, SETTLE_ROUNDS = 1.0, 6
ENDS = {"done": "is done", "stopped": "stopped", "aborted": "was aborted", "failed": "failed", "crashed": "crashed"}
SYSTEM_ACTIONS = ("screen.copy_text", "screen.minimize", "app.focus_next", "app.focus_previous")
KEPT_COMMANDS = ("Theme", "Maximize", "Minimize")


class FinetuiApp(App[None]):
    """finetui in a terminal. `folder` holds the runs; `watch` is a run or a recorded log to open at once, `chat` a run
    to talk to."""

    TITLE = "finetui"
    CSS_PATH = "app.tcss"
    BINDINGS = [Binding("ctrl+q", "quit", "Quit", show=False, priority=True)]

    def __init__(self, folder: Path | None = None, watch: Run | None = None, chat: Run | None = None) -> None:
        super().__init__()
        self.folder = folder or runs_dir()
        self.watch_first, self.chat_first = watch, chat
        self.animation_level = "none"
        self._typed: asyncio.Queue[events.Event] = asyncio.Queue()
        self._told: set[tuple[str, str]] = set()
        if (kept := kept_settings().get("theme")) in self.available_themes:
            self.theme = kept

    def get_default_screen(self) -> Screen[None]:
        default = (Path.cwd() / "runs").absolute()
        return HomeScreen(self.folder, "" if self.folder == default else str(self.folder))

    def on_mount(self) -> None:
        self.hand_out_keys()
        gc.freeze()  # what lives as long as the app is not gone through again at every full collection
        sys.setswitchinterval(0.001)  # a thread that reads a long log gives way to the keyboard five times as often
        self.theme_changed_signal.subscribe(self, lambda theme: keep_settings({"theme": theme.name}))
        self.set_interval(LOOK_AT_TERMINAL_S, self.end_without_terminal)
        if not self.is_headless:
            threading.Thread(target=_leave_a_lost_terminal, name="terminal", daemon=True).start()
        if self.watch_first:
            self.push_screen(DashboardScreen(self.watch_first))
        if self.chat_first:
            from tui.chat import ChatScreen

            self.push_screen(ChatScreen(self.chat_first))

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key | events.Paste) and not event.is_forwarded:
            self._typed.put_nowait(event)
        else:
            await super().on_event(event)

    @work(group="keys")
    async def hand_out_keys(self) -> None:
        """Give each key to where the keys before it have led, however fast they come. A key's binding is looked up only
        once the key was passed through all widgets up to the app, behind the keys that wait there: what is typed ahead,
        or comes at once over a slow link, would else reach the field that had the focus before."""
        while True:
            event = await self._typed.get()
            if isinstance(event, events.Key) and event.key in ("tab", "shift+tab"):
                await self._settle(laid_out=True)  # the order of fields is that of their places
            await super().on_event(event)
            if not (isinstance(event, events.Key) and event.is_printable and isinstance(self.focused, Input)):
                await self._settle()

    async def _settle(self, *, laid_out: bool = False) -> None:
        """Wait until whatever has the focus, and all it stands in, have done what they were told so far."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                for _ in range(SETTLE_ROUNDS):
                    target = self.focused or self.screen
                    chain = target.ancestors_with_self
                    for node in chain:
                        await _reached(node.call_later)
                    if (self.focused or self.screen) is target and not any(node.message_queue_size for node in chain):
                        break
                if laid_out:
                    await _reached(self.screen.call_after_refresh)

    def end_without_terminal(self) -> None:
        """Leave when standard input has hung up: without a terminal the input thread would spin."""
        if not self.is_headless and terminal_is_gone():
            self.exit(return_code=EXIT_LOST_TERMINAL)

    @on(Ended)
    def run_ended(self, event: Ended) -> None:
        """Ring once for each end: the bell, a notification of the terminal, and words in the line on top, for a toast
        would cover the page one works on."""
        if (event.run_name, event.status) in self._told:
            return
        self._told.add((event.run_name, event.status))
        words = end_message(event.run_name, event.status)
        self.bell()
        if self._driver is not None:
            self._driver.write(notification(words, in_tmux=bool(os.environ.get("TMUX"))))
        told = f"{GLYPHS.get(event.status, '?')} {words.removeprefix('finetui: ')}"
        news = Content.styled(told, HUES.get(event.status, ""))
        for screen in self.screen_stack:
            for banner in screen.query(Banner):
                banner.tell(news)

    @on(DashboardScreen.GoOn)
    def go_on(self, event: DashboardScreen.GoOn) -> None:
        """KTO from the model of the run on the screen: home opens the wizard."""
        home = self.screen_stack[0]
        if isinstance(home, HomeScreen):
            while len(self.screen_stack) > 1:
                self.pop_screen()
            home.go_on_with_kto(event.run)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every action of the screen, then themes."""
        told: set[str] = set()
        for active in screen.active_bindings.values():
            binding = active.binding
            ours = active.node in (screen, self) or binding.show
            if not active.enabled or not ours or binding.description in told or binding.action in SYSTEM_ACTIONS:
                continue
            told.add(binding.description)
            act = functools.partial(self.run_action, binding.action, active.node)
            yield SystemCommand(binding.description, f"key {self.get_key_display(binding)}", act)
        for command in super().get_system_commands(screen):
            if command.title in KEPT_COMMANDS:
                yield command

    def action_help(self) -> None:
        """The keys of this screen, from its own bindings."""
        shown: dict[str, str] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if binding.show or (active.node is self.screen and binding.action not in SYSTEM_ACTIONS):
                shown.setdefault(binding.description, self.get_key_display(binding))
        shown["Every action, themes"] = "ctrl+p"
        place = getattr(self.screen, "place", "")
        self.push_screen(HelpScreen(f"Keys: {place}", [(key, words) for words, key in shown.items()]))


async def _reached(call: Callable[[Callable[[], None]], bool]) -> None:
    """Wait until `call` calls back, where it will."""
    done = asyncio.Event()
    if call(done.set):
        await done.wait()


def end_message(name: str, status: str) -> str:
    """What is told of an end. A name that is not plainly a run's is left out: it goes to the terminal as it is."""
    shown = name if NAME.fullmatch(name) else "a run"
    return f"finetui: {shown} {ENDS.get(status, 'is over')}"


def notification(words: str, *, in_tmux: bool) -> str:
    """OSC 9, which terminals show as a notification of the desktop; handed through tmux where that allows it."""
    plain = f"\x1b]9;{words}\x07"
    return "\x1bPtmux;" + plain.replace("\x1b", "\x1b\x1b") + "\x1b\\" if in_tmux else plain


def settings_path() -> Path:
    return cache_dir() / "app.json"


def kept_settings() -> dict[str, Any]:
    """What the app keeps between starts; empty where nothing can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(settings_path().read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def keep_settings(settings: dict[str, Any]) -> None:
    """Keep these; a cache that cannot be written loses no more than a theme."""
    kept = {**kept_settings(), **settings}
    with contextlib.suppress(OSError), replacing(settings_path(), sync=False) as stream:
        json.dump(kept, stream)


def _leave_a_lost_terminal() -> None:
    """End the process where the app cannot: a terminal that took nothing before it went, as over a link that stalled,
    leaves the driver waiting for ever to write the rest."""
    while not terminal_is_gone():
        time.sleep(LOOK_AT_TERMINAL_S)
    time.sleep(LEAVE_S)
    os._exit(EXIT_LOST_TERMINAL)


def terminal_is_gone() -> bool:
    """Whether standard input has hung up."""
    if os.name == "nt":
        return False
    poll = select.poll()
    try:
        poll.register(sys.__stdin__.fileno() if sys.__stdin__ else 0, 0)  # hang-up and errors are always reported
        return any(seen & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, seen in poll.poll(0))
    except (OSError, ValueError):
        return True
