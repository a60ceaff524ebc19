"""Matplotlib figures as SVG that belongs to the page: its fonts, its colours in light and dark mode, its ids."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

# Figures are drawn in stand-in colours, each of which becomes a variable of the page's style sheet.
INK, MUTED, TRACK, KEPT, DROPPED = "#000001", "#000002", "#000003", "#000004", "#000005"
LINES = ("#000011", "#000012", "#000013", "#000014")
_VARIABLES = {INK: "ink", MUTED: "muted", TRACK: "track", KEPT: "kept", DROPPED: "dropped"}
_VARIABLES |= {colour: f"line-{number}" for number, colour in enumerate(LINES, 1)}

WIDTH = 11.0  # inches, as all lengths in figures; the page scales a picture to its own width

_STYLE = {
    "axes.edgecolor": TRACK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.size": 8,
    "grid.color": TRACK,
    "svg.fonttype": "none",  # text stays text: it can be searched, selected and read aloud
    "text.color": INK,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the page's style, whatever the user's own matplotlib settings are; they come back afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A character missing from matplotlib's font is no concern: the browser's fonts draw the text.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        matplotlib.style.use(["default", _STYLE])
        yield


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """Return ``figure`` as an ``<svg>`` element whose ids start with ``name``; ``description`` is its text alternative.

    Call it inside :func:`page_style`. The same figure gives the same text: no date, and ids that are hashes of content.
    """
    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().partition("<svg ")[2]  # what precedes it names a document type on another site
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(f"(?<=: )({'|'.join(_VARIABLES)})", lambda colour: f"var(--{_VARIABLES[colour[0]]})", svg)
    return Markup(f'<svg role="img" aria-label="{escape(description)}" {svg}')


def label(text: str, length: int) -> str:
    """Return ``text`` on one line of at most ``length`` characters; a longer one loses its middle."""
    text = "".join(character if character.isprintable() else " " for character in text)
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"
