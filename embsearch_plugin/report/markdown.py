"""Tables as Markdown."""

import re
from collections.abc import Collection, Iterable, Sequence


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str]) -> str:
    """Return a table as Markdown.

    Args:
        names: of the columns.
        rows: as Markdown, see :func:`plain`.
        words: the columns that hold words, at the left; numbers are at the right.
    """
    lines = [names, ["---" if name in words else "---:" for name in names], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(text.split()))
