"""The app: it opens home, shows help, and ends when its terminal is gone. Training never depends on it."""

import os
import select
import sys
from pathlib import Path

from textual.app import App
from textual.binding import Binding
from textual.screen import Screen

from core.paths import runs_dir
from tui.dialogs import HelpScreen
from tui.home import HomeScreen

LOOK_AT_TERMINAL_S = 1.0
EXIT_LOST_TERMINAL = 129
SYSTEM_ACTIONS = ("screen.copy_text", "screen.minimize")


class FinetuiApp(App[None]):
    """finetui in a terminal. `folder` holds the runs."""

    TITLE = "finetui"
    CSS_PATH = "app.tcss"
    BINDINGS = [Binding("ctrl+q", "quit", "Quit", show=False, priority=True)]

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder or runs_dir()
        self.animation_level = "none"

    def get_default_screen(self) -> Screen[None]:
        default = (Path.cwd() / "runs").absolute()
        return HomeScreen(self.folder, "" if self.folder == default else str(self.folder))

    def on_mount(self) -> None:
        self.set_interval(LOOK_AT_TERMINAL_S, self.end_without_terminal)

    def end_without_terminal(self) -> None:
        """Leave when standard input has hung up: without a terminal the input thread would spin."""
        if not self.is_headless and terminal_is_gone():
            self.exit(return_code=EXIT_LOST_TERMINAL)

    def action_help(self) -> None:
        """The keys of this screen, from its own bindings."""
        shown: dict[str, str] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if binding.show or (active.node is self.screen and binding.action not in SYSTEM_ACTIONS):
                shown.setdefault(binding.description, self.get_key_display(binding))
        place = getattr(self.screen, "place", "")
        self.push_screen(HelpScreen(f"Keys: {place}", [(key, words) for words, key in shown.items()]))


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
