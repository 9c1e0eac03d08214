"""Drawing of `synthetic_pedestrians`: stylised people, seen by six cameras, as pure functions of integers.

People come in families of `FAMILY_SIZE` that share the colours of their clothes and differ in one or two things: a
part (logo, shoes, bag), the whole (build, figure, proportion, habit) or the cut of the clothes. Colour narrows a query
down to some families; only structure picks the person.

Pixels are the same on every machine: shapes are rasterised here, with coverage from distances, by + - * / and square
roots alone, which IEEE 754 rounds one way only, and random numbers are taken as raw uniforms.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

HEIGHT, WIDTH = 128, 64
NUM_CAMERAS = 6

# Difficulty. At 0 each of these leaves its disturbance out; 1 (or the value here) is the calibrated difficulty.
FAMILY_SIZE = 4  # people who share their colours, at most 10; more are harder
CAST_STRENGTH = 1.0  # colour gains, tone and saturation that set one camera apart from another
CAST_JITTER = 0.22  # relative spread of the same from image to image of one camera
NOISE = 1.0  # sensor noise, in multiples of each camera's own
BLUR = 1.0  # defocus, in multiples of each camera's own
MISALIGNMENT = 1.0  # 1: boxes off by up to 5 % of their height and 9 % in scale
POSE_JITTER = 1.0  # limbs and viewing angle from image to image of one person
OCCLUSION_PROBABILITY = 0.2  # images with a pole, a bollard or a passer-by before the person
CLUTTER = 5  # objects in the background, in the colours of clothes

Color = tuple[int, int, int]
UPPER_COLORS: tuple[Color, ...] = (
    (196, 52, 48), (48, 84, 176), (52, 132, 76), (214, 172, 62), (122, 74, 148), (40, 40, 46), (226, 224, 216),
    (128, 130, 134),
)  # fmt: skip
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
FIGURES = {"even": (1.0, 1.0), "shoulders": (1.2, 0.76), "hips": (0.76, 1.24)}  # width at the shoulders, at the hips
PROPORTIONS = {"long legs": (0.425, 0.88), "medium": (0.49, 1.0), "short legs": (0.57, 1.2)}  # level of hips, size of head


@dataclasses.dataclass(frozen=True)
class Habit:
    """How a person tends to stand: what the arms do, how far the feet are apart, how much the head hangs."""

    arms: str
    stance: float
    stoop: float


HABITS = {
    "plain": Habit("down", 0.055, 0.0),
    "akimbo": Habit("akimbo", 0.06, 0.0),
    "phone": Habit("phone", 0.05, 0.0),
    "holding": Habit("holding", 0.03, 0.07),
    "striding": Habit("swing", 0.16, 0.0),
}

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


@dataclasses.dataclass(frozen=True)
class Camera:
    """A viewpoint, a scene and a sensor."""

    facing: str  # the side of people it sees: front, back or side
    turn: float  # how far that side is turned away: the shift of the torso's middle, in half widths
    tilt: float  # how steeply it looks down: widens the top of a person and shortens the legs
    horizon: float  # where the floor meets the wall, as a fraction of the image's height
    gains: tuple[float, float, float]
    tone: float  # lifts (> 0) or sinks (< 0) the middle tones
    contrast: float
    saturation: float
    blur: float  # weight of the neighbours
    noise: float  # standard deviation, in grey levels


CAMERAS = (
    Camera("front", 0.0, 0.05, 0.66, (1.0, 1.0, 1.0), 0.0, 1.0, 1.0, 0.05, 3.0),
    Camera("back", 0.0, 0.0, 0.74, (0.66, 0.9, 1.4), 0.2, 0.85, 0.8, 0.15, 6.0),
    Camera("front", 0.32, 0.12, 0.58, (1.42, 1.0, 0.6), -0.1, 1.1, 1.1, 0.1, 4.0),
    Camera("side", 0.45, 0.0, 0.7, (0.7, 1.22, 0.78), -0.3, 0.9, 0.7, 0.2, 9.0),
    Camera("back", -0.3, 0.1, 0.5, (1.28, 0.72, 1.26), 0.3, 1.2, 0.9, 0.1, 5.0),
    Camera("front", -0.32, 0.2, 0.44, (1.1, 1.22, 0.66), 0.45, 0.75, 0.6, 0.22, 7.0),
)


class _Random:
    """Draws from the stream that a few integers name."""

    def __init__(self, *key: int):
        self.bits = np.random.PCG64(np.random.SeedSequence(key))
        self._uniform = np.random.Generator(self.bits).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._uniform()

    def around(self, spread: float) -> float:
        return spread * (2 * self._uniform() - 1)

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def pick[T](self, options: Sequence[T]) -> T:
        return options[int(self._uniform() * len(options))]

    def shuffled[T](self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(int(self._uniform() * len(rest))) for _ in options]
