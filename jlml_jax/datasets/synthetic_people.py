"""The people of `synthetic_pedestrians`: what stays with each from image to image, a pure function of integers.

People come in families of `FAMILY_SIZE` that share the colours of their clothes and differ in one or two things: a
part (logo, shoes, bag), the whole (build, figure, proportion, habit) or the cut of the clothes. Colour narrows a query
down to some families; only structure picks the person.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

FAMILY_SIZE = 4  # people who share the colours of their clothes, at most 11

T = TypeVar("T")
Color = tuple[float, float, float]  # RGB, 0 to 255
UPPER_COLORS: tuple[Color, ...] = (
    (196, 52, 48), (48, 84, 176), (52, 132, 76), (214, 172, 62), (122, 74, 148), (40, 40, 46), (226, 224, 216),
    (128, 130, 134),
)
LOWER_COLORS: tuple[Color, ...] = ((36, 36, 42), (52, 66, 118), (116, 112, 110), (188, 166, 126), (104, 70, 48))
HAIR_COLORS: tuple[Color, ...] = ((34, 26, 24), (96, 60, 36), (206, 170, 96), (150, 148, 146))
SKIN_COLORS: tuple[Color, ...] = ((240, 204, 176), (206, 158, 122), (150, 104, 74), (98, 66, 48))
BLACK: Color = (26, 26, 28)
WHITE: Color = (240, 240, 236)

QUIET_PATTERNS = ("plain", "sleeves", "hem")  # these leave the chest free for a logo
PATTERNS = (*QUIET_PATTERNS, "hoops", "columns", "checks", "yoke", "panel", "halves", "sash")
LOWER_PATTERNS = ("plain", "seam", "bands", "cuffs")
LOGOS = ("none", "disc", "bar", "cross", "triangle", "ring")
SHOES = ("black", "white", "black boots", "white boots")
BAGS = ("none", "backpack", "shoulder", "handbag")
HAIR = ("short", "long", "bun", "afro", "hat")
BUILDS = {"slim": 0.76, "medium": 1.0, "heavy": 1.28}  # width of torso and limbs
FIGURES = {"even": (1.0, 1.0), "shoulders": (1.2, 0.76), "hips": (0.76, 1.24)}  # at shoulders, at hips
# Level of the hips, as a fraction of the height, and size of the head.
PROPORTIONS = {"long legs": (0.425, 0.88), "medium": (0.49, 1.0), "short legs": (0.57, 1.2)}


# What the arms do, how far each foot is from the middle, how far the head hangs, forward and down.
HABITS = {
    "plain": ("down", 0.055, 0.0),
    "akimbo": ("akimbo", 0.06, 0.0),
    "phone": ("phone", 0.05, 0.0),
    "holding": ("holding", 0.03, 0.05),
    "striding": ("swing", 0.16, 0.0),
}

# The attributes that a family of one kind differs in: parts, the whole, or the cut of the clothes.
PART = {"logo": LOGOS, "shoes": SHOES, "bag": BAGS}
WHOLE = {"build": tuple(BUILDS), "figure": tuple(FIGURES), "proportion": tuple(PROPORTIONS), "habit": tuple(HABITS)}
CUT = {
    "pattern": PATTERNS,
    "lower_pattern": LOWER_PATTERNS,
    "garment": ("trousers", "shorts", "skirt"),
    "sleeves": ("short", "long"),
    "coat": ("short", "long"),
    "hair": HAIR,
}
FAMILY_KINDS = (PART, WHOLE, CUT)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What stays with a person from image to image."""

    upper: Color
    accent: Color
    lower: Color
    skin: Color
    hair_color: Color
    bag_color: Color
    bag_side: int  # -1 or 1: right or left, as the camera sees a person from the front
    logo_level: float  # down the torso, 0 to 1
    pattern: str
    lower_pattern: str
    garment: str
    sleeves: str
    coat: str
    hair: str
    logo: str
    shoes: str
    bag: str
    build: str
    figure: str
    proportion: str
    habit: str


class Random:
    """Draws from the stream that a few integers name."""

    def __init__(self, *key: int):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))
        self._uniform = np.random.Generator(self.bits).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._uniform()

    def around(self, spread: float) -> float:
        return spread * (2 * self._uniform() - 1)

    def span(self, starts: tuple[float, float], lengths: tuple[float, float]) -> tuple[float, float]:
        start = self.between(*starts)
        return start, start + self.between(*lengths)

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._uniform() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(int(self._uniform() * len(rest))) for _ in options]


def draw_identity(seed: int, identity: int) -> Identity:
    """The attributes of person `identity` (1 and up) among the people of `seed`, however many of them are drawn."""
    if identity < 1:
        raise ValueError(f"identities are 1 and up, not {identity}")
    family, member = divmod(identity - 1, FAMILY_SIZE)
    random = Random(seed, 0, family)
    kind = random.pick(FAMILY_KINDS)
    upper = random.pick(UPPER_COLORS)
    choices = {name: random.pick(options) for name, options in (PART | WHOLE | CUT).items()}
    if kind is PART or choices["logo"] != "none":
        choices["pattern"] = random.pick(QUIET_PATTERNS)
    accent = random.pick(_unlike(UPPER_COLORS, upper, 50))
    founder = Identity(
        upper=upper,
        accent=accent,
        lower=random.pick(LOWER_COLORS),
        skin=random.pick(_unlike(SKIN_COLORS, accent if choices["pattern"] == "sleeves" else upper, 38)),
        hair_color=random.pick(HAIR_COLORS),
        bag_color=opposite(upper),
        bag_side=random.pick((-1, 1)),
        logo_level=random.pick((0.3, 0.64)),
        **choices,
    )
    # Every further member changes one attribute of the founder, so that any two differ in one or two.
    others = {name: random.shuffled([option for option in options if option != choices[name]])
              for name, options in kind.items()}
    order = random.shuffled(tuple(kind))
    turns = range(max(map(len, others.values())))
    changes = [(name, others[name][turn]) for turn in turns for name in order if turn < len(others[name])]
    return dataclasses.replace(founder, **dict([changes[member - 1]])) if member else founder


def _luminance(color: Color) -> float:
    return (3 * color[0] + 6 * color[1] + color[2]) / 10


def _unlike(colors: Sequence[Color], other: Color, margin: float) -> list[Color]:
    return [color for color in colors if abs(_luminance(color) - _luminance(other)) > margin]


def opposite(color: Color) -> Color:
    return WHITE if _luminance(color) < 110 else BLACK
