"""The style of figures: one palette for page and plots in light and dark, and SVG elements from matplotlib figures.

A plot is drawn in the light colours. In the SVG each colour is replaced by the CSS variable of its name, so the browser
picks light or dark. Text stays text. The same figure always gives the same bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Name -> (light, dark). Okabe and Ito's colours, which colour-blind readers can tell apart; the dark ones are brighter.
# The light values are distinct: they identify a colour in the SVG.
PALETTE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ink": ("#1b2430", "#e6e9ee"),
        "soft": ("#5d6875", "#9aa5b1"),
        "rule": ("#d7dce2", "#37414d"),
        "paper": ("#ffffff", "#161b22"),
        "panel": ("#f5f7f9", "#1f2630"),
        "good": ("#007a59", "#2fc898"),
        "bad": ("#b8401a", "#ff8a5c"),
        "prefill": ("#0072b2", "#58b0ea"),
        "decode": ("#d55e00", "#f59a4a"),
        "colocated": ("#009e73", "#3fcf9f"),
        "mixed": ("#aa4a86", "#e39bc6"),
        "sky": ("#56b4e9", "#8fd0f7"),
        "amber": ("#e69f00", "#f4bf4f"),
        "plum": ("#cc79a7", "#e6a6c8"),
        "idle": ("#8b95a1", "#76818e"),
    }
)

WIDE, HALF = 9.0, 4.4  # inches: the page's width, and one of two figures in a row

_RC: Any = {  # matplotlib types the keys as a literal of all its settings
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is text
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": PALETTE["soft"][0],
    "axes.labelcolor": PALETTE["soft"][0],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.6,
    "text.color": PALETTE["ink"][0],
    "xtick.color": PALETTE["soft"][0],
    "ytick.color": PALETTE["soft"][0],
    "xtick.labelcolor": PALETTE["ink"][0],
    "ytick.labelcolor": PALETTE["ink"][0],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_NO_METADATA: dict[str, str | None] = {"Date": None, "Creator": None, "Format": None, "Type": None}


def light(name: str) -> str:
    """The colour of the palette for plots."""
    return PALETTE[name][0]


def css_variables() -> Markup:
    """CSS declarations of the palette: dark if the reader prefers dark, always light in print."""
    bright = "".join(f"--{name}:{colours[0]};" for name, colours in PALETTE.items())
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in PALETTE.items())
    return Markup(f":root{{{bright}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}")


@contextmanager
def drawing_style() -> Iterator[None]:
    with mpl.rc_context(_RC):
        yield


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure with automatic layout. Draw inside `drawing_style`."""
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def as_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element. `name` makes its ids unique on the page; screen readers read `title` and
    `description`."""
    buffer = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    variables = {colours[0]: f"var(--{colour})" for colour, colours in PALETTE.items()}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    head = f'<svg role="img" aria-labelledby="{name}-title {name}-desc"'
    texts = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    text = text.replace("<svg", head, 1).replace(">", f">{texts}", 1)
    return Markup(text)


def only_vertical_grid(axes: Axes) -> None:
    """For horizontal bars: no ticks and no grid lines between the bars."""
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
