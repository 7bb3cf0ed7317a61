"""The live view of `llmos top`, drawn with textual."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, OptionList, Sparkline
from textual.widgets.option_list import Option
from textual.worker import Worker

from llmos.cli import top_snapshot as rows
from llmos.cli.output import printable
from llmos.cli.top_snapshot import Fleet, Row, Snapshot
from llmos.errors import CapacityError, LlmosError

_HISTORY = 120
_ID_CHARS = 24


class Table(DataTable[Text]):
    """A table whose cells are drawn as they are."""


class Confirm(ModalScreen[bool]):
    """Asks before something is changed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """The question, and what to press."""
        with Vertical(classes="dialog"):
            yield Label(printable(self._question), markup=False)
            yield Label("y: yes    n: no", markup=False)

    def action_answer(self, sure: bool) -> None:
        """The person has decided."""
        self.dismiss(sure)


class ChooseClass(ModalScreen[str | None]):
    """Asks for a class of service."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self._request_id = request_id

    def compose(self) -> ComposeResult:
        """The three classes."""
        with Vertical(classes="dialog"):
            yield Label(printable(f"New class of {self._request_id}:"), markup=False)
            yield OptionList(*(Option(name, id=name) for name in ("interactive", "standard", "batch")))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """One was chosen."""
        self.dismiss(event.option.id)


class TopApp(App[None]):
    """Looks at the fleet every `interval_s` seconds; goes on while it does not answer."""

    CSS = """
    #headline { height: 1; text-style: bold; padding: 0 1; }
    #rate { height: 2; padding: 0 1; }
    DataTable { height: auto; max-height: 20%; }
    #requests { height: 1fr; max-height: 100%; min-height: 4; }
    Confirm, ChooseClass { align: center middle; }
    .dialog { width: auto; max-width: 90%; height: auto; padding: 1 2; border: round $primary; background: $surface; }
    .dialog OptionList { width: 30; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "kill", "Kill request"),
        Binding("n", "nice", "Nice request"),
        Binding("d", "drain", "Drain worker"),
        Binding("u", "undrain", "Undrain"),
        Binding("p", "pause", "Pause"),
        Binding("q", "quit", "Quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, fleet: Fleet, first: Snapshot, interval_s: float) -> None:
        super().__init__()
        self.failure: LlmosError | None = None
        """Why it ended by itself."""
        self.looks = 0
        """Snapshots drawn so far."""
        self._fleet = fleet
        self._snapshot = first
        self._interval_s = interval_s
        self._paused = False
        self._looking: Worker[None] | None = None
        self._rates: deque[float] = deque([0.0], maxlen=_HISTORY)

    def compose(self) -> ComposeResult:
        """Headline, rate, four tables, keys."""
        yield Label("", id="headline", markup=False)
        yield Sparkline(list(self._rates), id="rate", summary_function=max)
        for name in ("workers", "models", "queues", "requests"):
            table = Table(id=name, cursor_type="row", zebra_stripes=True)
            yield table
        yield Footer()

    def on_mount(self) -> None:
        """Draw what was found at the start, then look again and again."""
        columns = {
            "workers": rows.WORKER_COLUMNS,
            "models": rows.MODEL_COLUMNS,
            "queues": rows.QUEUE_COLUMNS,
            "requests": rows.REQUEST_COLUMNS,
        }
        for name, titles in columns.items():
            self.query_one(f"#{name}", Table).add_columns(*titles)
        self.query_one("#requests", Table).focus()
        self._draw(self._snapshot)
        self.set_interval(self._interval_s, self._look_again)

    def _look_again(self) -> None:
        """A fleet that is slow to answer is not asked twice at once."""
        if not self._paused and (self._looking is None or self._looking.is_finished):
            self._looking = self.run_worker(self._look(), exit_on_error=False)

    async def _look(self) -> None:
        try:
            self._snapshot = await self._fleet.look()
        except CapacityError as error:
            if not self._paused:
                self._say(f"reconnecting: {error.message}")
            return
        except LlmosError as error:
            self.failure = error
            self.exit()
            return
        if not self._paused:  # it may have been paused while this look was on its way
            self._draw(self._snapshot)

    def _draw(self, snapshot: Snapshot) -> None:
        self.looks += 1
        self._rates.append(snapshot.tokens_per_s)
        self._say(snapshot.headline())
        self.query_one("#rate", Sparkline).data = list(self._rates)
        _fill(self.query_one("#workers", Table), rows.worker_rows(snapshot))
        _fill(self.query_one("#models", Table), rows.model_rows(snapshot))
        _fill(self.query_one("#queues", Table), rows.queue_rows(snapshot))
        _fill(self.query_one("#requests", Table), rows.request_rows(snapshot))

    def _say(self, text: str) -> None:
        self.query_one("#headline", Label).update(printable(f"llmos · {text}"))

    # Steering

    def action_kill(self) -> None:
        """End the selected request."""
        request_id = self._selected("requests")
        if request_id:
            self._confirmed(f"Kill {request_id}?", lambda: self._fleet.kill(request_id))

    def action_drain(self) -> None:
        """Empty the selected worker."""
        node_id = self._selected("workers")
        if node_id:
            question = f"Drain {node_id}? It takes nothing new, what runs on it moves on."
            self._confirmed(question, lambda: self._fleet.drain(node_id, False))

    def action_undrain(self) -> None:
        """Take the selected worker back."""
        node_id = self._selected("workers")
        if node_id:
            self._confirmed(f"Take {node_id} back into service?", lambda: self._fleet.drain(node_id, True))

    def action_nice(self) -> None:
        """Move the selected request to another class."""
        request_id = self._selected("requests")

        def chosen(new: str | None) -> None:
            if new is not None:
                self._do(lambda: self._fleet.nice(request_id, new))

        if request_id:
            self.push_screen(ChooseClass(request_id), chosen)

    def action_pause(self) -> None:
        """Stop looking, so that a table can be read; or go on."""
        self._paused = not self._paused
        self._say("paused (p goes on)" if self._paused else self._snapshot.headline())

    def _confirmed(self, question: str, work: Callable[[], Awaitable[str]]) -> None:
        self.push_screen(Confirm(question), lambda sure: self._do(work) if sure else None)

    def _do(self, work: Callable[[], Awaitable[str]]) -> None:
        async def run() -> None:
            try:
                said = await work()
            except LlmosError as error:
                self.notify(printable(error.message), severity="error", markup=False)
                return
            self.notify(printable(said), markup=False)
            self._look_again()

        self.run_worker(run(), exit_on_error=False)

    def _selected(self, name: str) -> str:
        """Key of the row under a table's cursor; empty if it has none."""
        return _key_at_cursor(self.query_one(f"#{name}", Table))


def _key_at_cursor(table: Table) -> str:
    if not table.row_count:
        return ""
    return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value or ""


def _fill(table: Table, found: list[Row]) -> None:
    """Replace the rows; the cursor stays on the row that it was on."""
    selected, top = _key_at_cursor(table), table.scroll_y
    table.clear()
    for key, cells in found:
        table.add_row(*(Text(_shortened(printable(cell))) for cell in cells), key=key)
    keys = [key for key, _ in found]
    if selected in keys:
        table.move_cursor(row=keys.index(selected), scroll=False)
    table.scroll_to(y=top, animate=False)


def _shortened(cell: str) -> str:
    return cell if len(cell) <= _ID_CHARS else f"{cell[: _ID_CHARS - 1]}…"
