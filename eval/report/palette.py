"""The colours of reports and figures, which the colour-blind can distinguish.

One colour has one meaning: the experts' are theirs, violet is for what was measured (shades, bars, intervals), and
the rest is ink on paper. Colour is never alone: an expert also has a number and a way of underlining, a shade stands
beside its figure.
"""

from __future__ import annotations


# Okabe and Ito, Color Universal Design, 2008, in an order that keeps the first ones furthest apart. The last
# one, black there, is a grey that shows on either background.
EXPERT_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
LAST_COLOR = {"light": "#555555", "dark": "#d0d0d0"}
UNDERLINES = ("solid", "dashed", "dotted", "double", "wavy")
HATCHES = ("", "//", "..", "xx", "--")

# Of bars and intervals; shades go from the background to nearly this.
MEASURE = {"light": "#7a3fc0", "dark": "#a98bff"}
TINTS = (1.0, 0.62, 0.36)  # of it, where a figure has several measures
PAGE = {"light": "#ffffff", "dark": "#16181c"}
INK = {"light": "#1a1c1f", "dark": "#eceef1"}
# The strongest shade that text on it is still easily read on.
STRONGEST = {"light": 0.5, "dark": 0.42}


def expert_colors(theme: str = "light") -> list[str]:
    """Choose the experts' colours: expert i has colour i modulo their number."""
    return [*EXPERT_COLORS, LAST_COLOR[theme]]


def expert_color(index: int, theme: str = "light") -> str:
    colors = expert_colors(theme)
    return colors[index % len(colors)]


def measure_color(index: int = 0) -> str:
    """Choose the colour of a figure's measure: violet for the first, and lighter ones for two more."""
    tint = TINTS[index % len(TINTS)]
    mixed = (round(255 - tint * (255 - channel)) for channel in channels(MEASURE["light"]))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def underline(index: int) -> str:
    """Choose a CSS line style. Colour and style together are different for the first 40 experts."""
    return UNDERLINES[index % len(UNDERLINES)]


def hatch(index: int) -> str:
    """Choose a matplotlib hatch."""
    return HATCHES[index % len(HATCHES)]


def channels(color: str) -> tuple[int, int, int]:
    """Convert `#rrggbb` to three numbers from 0 to 255."""
    return tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))


__all__ = ["channels", "expert_color", "expert_colors", "hatch", "measure_color", "underline"]
