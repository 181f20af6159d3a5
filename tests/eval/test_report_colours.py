"""The report's colours: experts are told apart by the colour-blind, and text is legible on every ground."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from dylora_moe.eval.report import page as report
from dylora_moe.eval.report import palette


# Machado, Oliveira and Fernandes, IEEE Transactions on Visualization and Computer Graphics 15 (2009),
# severity 1.0.
COLOR_VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(channels) -> np.ndarray:
    values = np.asarray(channels) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(channels, vision: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of an sRGB colour as it is seen."""
    xyz = TO_XYZ @ (vision @ linear(channels)).clip(0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def over(color: str, theme: str, strength: float = 1.0) -> np.ndarray:
    opacity = palette.STRONGEST[theme] * strength
    page = np.array(palette.channels(palette.PAGE[theme]))
    return opacity * np.array(palette.channels(color)) + (1 - opacity) * page


@pytest.mark.parametrize("vision", COLOR_VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_experts_are_told_apart_by_the_colour_blind(theme, vision):
    """A difference of 2.3 is just noticeable. Lines and labels have the full colour, the ground of text has
    less."""
    colors = palette.expert_colors(theme)
    for first, second in itertools.combinations(colors, 2):
        seen = [lab(palette.channels(color), COLOR_VISION[vision]) for color in (first, second)]
        assert np.linalg.norm(seen[0] - seen[1]) > 15, (first, second)
        ground = [lab(over(color, theme), COLOR_VISION[vision]) for color in (first, second)]
        assert np.linalg.norm(ground[0] - ground[1]) > 6, (first, second)


def test_colour_is_never_alone():
    looks = {(palette.expert_color(index), palette.underline(index)) for index in range(40)}
    assert len(looks) == 40
    assert (
        len({palette.underline(index) for index in range(5)})
        == len({palette.hatch(index) for index in range(5)})
        == 5
    )


def contrast(first, second) -> float:
    """WCAG 2's contrast ratio."""
    bright, dark = sorted((float(TO_XYZ[1] @ linear(color)) for color in (first, second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_every_ground(theme):
    ink = palette.channels(palette.INK[theme])
    for color in [*palette.expert_colors(theme), palette.MEASURE[theme]]:
        for strength in np.linspace(0, 1, 11):
            assert contrast(ink, over(color, theme, strength)) > 4.5, (color, strength)
    page = palette.channels(palette.PAGE[theme])
    for color in (report.THEMES[theme]["muted"], palette.MEASURE[theme]):
        assert contrast(palette.channels(color), page) > 4.5, color


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_colour_has_one_meaning(theme):
    """What was measured has none of the experts' colours, and all else is a shade of grey."""
    for vision, least in zip(COLOR_VISION, (40, 12, 12, 12), strict=True):
        measure = lab(palette.channels(palette.MEASURE[theme]), COLOR_VISION[vision])
        for color in palette.expert_colors(theme):
            seen = lab(palette.channels(color), COLOR_VISION[vision])
            assert np.linalg.norm(measure - seen) > least, (vision, color)
    for name, color in [*report.THEMES[theme].items(), ("ink", palette.INK[theme])]:
        assert np.ptp(palette.channels(color)) <= 15, name
    style = Path(report.__file__).with_name(report.STYLE).read_text()
    assert not re.search(r": #|rgba?\(\d", style)  # no colour but these
