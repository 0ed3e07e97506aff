"""Progress of a run on a terminal or in a notebook."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from grainmill import trainable as catalog
from grainmill.config.experiment import Experiment
from grainmill.config.space import shown

if TYPE_CHECKING:
    from grainmill.search.records import TrialRecord

Item = TypeVar("Item")
out = Console(markup=False, emoji=False)  # texts hold names of files, such as [v2].jpg and :cat:.jpg
err = Console(stderr=True, markup=False, emoji=False)


def printable(text: str) -> str:
    """Return a text with escapes for control characters, which a terminal obeys, and for halves of characters."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def cell(text: str) -> str:
    """Return a text as one line for a table."""
    return printable(text).replace("\n", "\\n")


def setting_text(setting: Any) -> str:
    """A setting on one line."""
    return ", ".join(f"{name}={shown(value)}" for name, value in setting.items())


def bar(quiet: bool) -> catalog.Progress:
    """The `Progress` that draws a bar for each long loop, or none."""
    return catalog.no_progress if quiet else _bar


def _bar(items: Iterable[Item], title: str, length: int) -> Iterable[Item]:
    return track(items, escape(printable(title)), length, console=err, transient=True, disable=not _animated(err))


def note(quiet: bool) -> Callable[[str], None]:
    """A function that shows what is being done, or none of it."""
    return (lambda _: None) if quiet else (lambda text: out.print(printable(text), style="dim", soft_wrap=True))


def _animated(console: Console) -> bool:
    """Return True when the console can change what it has shown: a terminal, or a notebook with ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class RunDisplay:
    """The `Observer` that shows a run: a table that changes in place, or a line for each event; nothing if `quiet`."""

    def __init__(self, experiment: Experiment, quiet: bool = False) -> None:
        self.metric, self.epochs, self.quiet = next(iter(experiment.objective)), experiment.base.epochs, quiet
        self.rows: dict[str, tuple[str, ...]] = {}
        animated = not quiet and _animated(out)
        self.live = Live(console=out, refresh_per_second=4, get_renderable=self._table) if animated else None

    def __enter__(self) -> "RunDisplay":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def message(self, text: str) -> None:
        """Show that a step of the run begins."""
        if not self.quiet:
            out.print(printable(text), style="bold", soft_wrap=True)

    def trial(self, name: str, record: "TrialRecord") -> None:
        """Show a trial that began, finished an epoch, or ended."""
        metrics = record.metrics
        value = f"{metrics[self.metric]:.4f}" if metrics else ""
        epoch = f"{int(metrics.get('epoch', 0))}/{self.epochs}"
        self.rows[name] = (name, record.state, epoch, value, setting_text(record.setting))
        if not self.live and not self.quiet:
            out.print(printable("  ".join(self.rows[name])), soft_wrap=True, highlight=False)

    def _table(self) -> Table:
        table = Table("trial", "state", "epoch", self.metric, "setting")
        for row in list(self.rows.values())[-max(1, out.height - 8) :]:  # the newest that fit on the screen
            table.add_row(*map(cell, row))
        return table
