"""The results as a table for the terminal, and as Markdown."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from embsearch_plugin.report.inputs import Metrics, checked
from embsearch_plugin.report.markdown import markdown_table, plain
from embsearch_plugin.report.rows import Figure, columns, footnotes, narrow_columns, result_rows

__all__ = ["results_markdown", "results_table"]

_WORDS = {"method", "budget", "allocation", "trial"}  # columns that hold words, at the left


def results_table(metrics: Metrics | dict[str, Any]) -> Table:
    """Return the results in the content of a ``metrics.json`` as a table for a terminal of 80 characters.

    Raises:
        RunFolderError: where something is missing from it.
    """
    metrics = checked(metrics)
    table = Table(box=box.SIMPLE, show_edge=False, padding=0)  # the box itself leaves a space between columns
    names = narrow_columns(metrics)
    for name in names:
        words = name in _WORDS
        table.add_column(
            "\n".join(name.rsplit(" ", 1)), justify="left" if words else "right", no_wrap=not words, overflow="fold"
        )
    rows = result_rows(metrics)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following.budget != row.budget
        table.add_row(*(_styled(row.figures[name]) for name in names), end_section=last)
    notes = footnotes(metrics)
    table.caption = Text("\n".join(notes)) if notes else None
    table.caption_justify = "left"
    return table


def results_markdown(metrics: Metrics | dict[str, Any]) -> str:
    """Return the table of results, and why something is missing from it, as Markdown.

    Raises:
        RunFolderError: where something is missing from it.
    """
    metrics = checked(metrics)
    names = columns(metrics)
    rows = [[_emphasised(row.figures[name]) for name in names] for row in result_rows(metrics)]
    notes = [f"* {plain(note)}" for note in footnotes(metrics)]
    return "\n".join([markdown_table(names, rows, _WORDS), *(["", *notes] if notes else [])])


def _styled(figure: Figure) -> Text:
    # Text, not str: a method's name is not markup.
    return Text(figure.text, style="bold" if figure.best else "")


def _emphasised(figure: Figure) -> str:
    return f"**{plain(figure.text)}**" if figure.best else plain(figure.text)
