"""What both ways of augmentation take from the colour recipe of a crop (core.types.Colour)."""

from __future__ import annotations

from itertools import permutations

from gtsa.core.types import Colour

ORDERS = tuple(permutations((Colour.BRIGHTNESS, Colour.CONTRAST, Colour.SATURATION, Colour.HUE)))  # by Colour.ORDER
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)
RADIUS = 6  # of the blur kernel, px, at most: three standard deviations at the largest published sigma
BRIGHT = 128 / 255  # values from here upwards are solarised
