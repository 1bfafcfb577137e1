"""rich's console, progress bar and table, or plain lines of the same content where rich is not installed."""

import re
import sys

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Table

    def progress_bar(console: Console) -> RichProgress:
        columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
        return RichProgress(*columns, console=console)

except ImportError:
    MARKUP = re.compile(r"\[/?[a-z ]*\]")  # as in "[bold red]text[/]"

    class Console:
        def __init__(self, stderr: bool = False, width: int = 140, **options):
            self.stderr, self.width = stderr, width

        def print(self, text: object = "", markup: bool = True) -> None:
            shown = MARKUP.sub("", str(text)) if markup else str(text)
            print(shown, file=sys.stderr if self.stderr else sys.stdout, flush=True)

    class Progress:
        """Says how far it is in front of each line that is printed."""

        def __init__(self, console: Console):
            self._console, self.console = console, self
            self._total = self._done = 0

        def __enter__(self) -> "Progress":
            return self

        def __exit__(self, *error) -> None:
            pass

        def add_task(self, description: str, total: int) -> int:
            self._total = total
            return 0

        def update(self, task: int, description: str) -> None:
            pass

        def advance(self, task: int) -> None:
            self._done += 1

        def print(self, text: object, markup: bool = True) -> None:
            self._console.print(f"{self._done + 1}/{self._total} {text}", markup=markup)

    def progress_bar(console: Console) -> Progress:
        return Progress(console)

    class Table:
        def __init__(self, title: str = "", **options):
            self.title, self._rows = title, [[]]

        def add_column(self, name: str, **options) -> None:
            self._rows[0].append(name)

        def add_row(self, *cells: str, **options) -> None:
            self._rows.append([MARKUP.sub("", cell) for cell in cells])

        def __str__(self) -> str:
            full = [row + [""] * (len(self._rows[0]) - len(row)) for row in self._rows]
            widths = [max(map(len, column)) for column in zip(*full, strict=True)]
            lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in full]
            return "\n".join([self.title, *lines])


__all__ = ["Console", "Table", "progress_bar"]
