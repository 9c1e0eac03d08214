"""Drawing of `synthetic_pedestrians`: stylised people, seen by six cameras, as pure functions of integers.

Pixels are the same on every machine: shapes are rasterised here, with coverage from distances, by + - * / and square
roots alone, which IEEE 754 rounds one way only, and random numbers are taken as raw uniforms.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from jlml_jax.datasets.synthetic_people import (
    BLACK,
    BUILDS,
    FIGURES,
    HABITS,
    LOWER_COLORS,
    PROPORTIONS,
    SKIN_COLORS,
    UPPER_COLORS,
    WHITE,
    Color,
    Identity,
    Random,
    draw_identity,
    opposite,
)

HEIGHT, WIDTH = 128, 64
NUM_CAMERAS = 6

# The difficulty. A factor of 0 leaves its disturbance out; a greater one makes matching harder.
CAST_STRENGTH = 1.0  # factor on what sets one camera's colours apart from another's: gains, tone, contrast, saturation
CAST_JITTER = 0.08  # how far the same vary from image to image of one camera
NOISE = 1.0  # factor on each camera's sensor noise
BLUR = 1.0  # factor on each camera's blur
MISALIGNMENT = 1.0  # factor on the boxes' errors: 6 % in scale, 3.5 pixels across, 4.5 down
POSE_JITTER = 1.0  # factor on how limbs and the angle of view vary from image to image of one person
OCCLUSION_PROBABILITY = 0.2  # of a pole, a bollard or a passer-by before the person
CLUTTER = 5  # objects in the background, in the colours of clothes

Point = tuple[float, float]
Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]  # across (-1 to 1) and along (0 to 1) a limb to [3, h, w]


@dataclasses.dataclass(frozen=True)
class Camera:
    """A viewpoint, a scene and a sensor."""

    facing: str  # which side of people it sees: front, back or side
    turn: float  # by how much that is turned away: shift of the torso's middle, in half widths
    tilt: float  # how steeply it looks down: widens the top of a person and shortens the legs
    horizon: float  # where the floor meets the wall, as a fraction of the image's height
    gains: tuple[float, float, float]
    tone: float  # lifts (> 0) or sinks (< 0) the middle tones
    contrast: float
    saturation: float
    blur: float  # weight of each neighbouring pixel
    noise: float  # standard deviation, in grey levels


CAMERAS = (
    Camera("front", 0.0, 0.05, 0.66, (1.0, 1.0, 1.0), 0.0, 1.0, 1.0, 0.05, 3.0),
    Camera("back", 0.0, 0.0, 0.74, (0.88, 0.96, 1.14), 0.07, 0.95, 0.93, 0.15, 6.0),
    Camera("front", 0.32, 0.12, 0.58, (1.15, 1.0, 0.86), -0.04, 1.04, 1.04, 0.1, 4.0),
    Camera("side", 0.45, 0.0, 0.7, (0.9, 1.08, 0.92), -0.1, 0.96, 0.9, 0.2, 9.0),
    Camera("back", -0.3, 0.1, 0.5, (1.1, 0.9, 1.09), 0.1, 1.07, 0.96, 0.1, 5.0),
    Camera("front", -0.32, 0.2, 0.44, (1.04, 1.08, 0.88), 0.16, 0.91, 0.86, 0.22, 7.0),
)


def draw_image(seed: int, identity: int, camera: int, index: int) -> np.ndarray:
    """Image `index` (0 and up) of a person (1 and up) by a camera (1 to 6): uint8 [128, 64, 3], a pure function."""
    return draw_person(draw_identity(seed, identity), camera, (seed, 1, identity, camera, index))


def draw_crops(count: int, height: int, width: int) -> np.ndarray:
    """An image each of `count` people, resized as in training: uint8 [count, height, width, 3]. To try a network on."""
    drawn = [draw_image(0, identity, 1 + identity % NUM_CAMERAS, 0) for identity in range(1, count + 1)]
    return np.stack([Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR) for pixels in drawn])


def draw_person(person: Identity, camera: int, key: Sequence[int]) -> np.ndarray:
    """An image of any person: uint8 [128, 64, 3]. `key` names pose, background and sensor noise."""
    if not 1 <= camera <= NUM_CAMERAS:
        raise ValueError(f"cameras are 1 to {NUM_CAMERAS}, not {camera}")
    view = CAMERAS[camera - 1]
    random = Random(*key)
    canvas = _draw_background(view, random)
    frame = _Frame(canvas, view, random)
    _draw_body(frame, person, view, random)
    if random.chance(OCCLUSION_PROBABILITY):
        _draw_occluder(canvas, random)
    return _expose(canvas, view, random)


def _shade(color: Color, factor: float) -> Color:
    return tuple(channel * factor for channel in color)


# Rasterising: everything is a limb, a segment of tapering width with round or flat ends.

_ROWS = np.arange(HEIGHT, dtype=np.float32)[:, None] + np.float32(0.5)
_COLUMNS = np.arange(WIDTH, dtype=np.float32) + np.float32(0.5)


def _clip(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.minimum(np.maximum(values, low), high)  # a third of np.clip's time on small arrays


def _planes(color: Color) -> np.ndarray:
    return np.array(color, np.float32)[:, None, None]


def _draw_limb(canvas: np.ndarray, start: Point, end: Point, widths: tuple[float, float], color: Color | None,
               *, flat: bool = False, texture: Texture | None = None) -> None:
    """Draws on canvas [3, H, W] a segment, in pixels, of half widths `widths` at its start and at its end."""
    (x0, y0), (x1, y1) = start, end
    reach = max(widths) + 1.5
    left, right = max(int(min(x0, x1) - reach), 0), min(int(max(x0, x1) + reach) + 1, WIDTH)
    top, bottom = max(int(min(y0, y1) - reach), 0), min(int(max(y0, y1) + reach) + 1, HEIGHT)
    if left >= right or top >= bottom:
        return
    dx, dy = x1 - x0, y1 - y0
    length = max(math.sqrt(dx * dx + dy * dy), 1e-3)
    dx, dy = dx / length, dy / length
    x, y = _COLUMNS[left:right] - x0, _ROWS[top:bottom] - y0
    along = x * dx + y * dy  # 0 at the start
    across = x * dy - y * dx
    inside = _clip(along, 0, length)
    half = inside * ((widths[1] - widths[0]) / length)
    half += widths[0]
    if flat:
        depth = np.minimum(half - np.abs(across), length / 2 - np.abs(along - length / 2))
    else:
        along -= inside
        along *= along
        along += across * across
        depth = half - np.sqrt(along)
    depth += 0.5
    coverage = _clip(depth, 0, 1)
    region = canvas[:, top:bottom, left:right]
    change = (_planes(color) if texture is None else texture(across / half, inside / length)) - region
    change *= coverage
    region += change


def _soft(signed: np.ndarray, sharpness: float = 12.0) -> np.ndarray:
    """1 where positive, 0 where negative, with a soft edge."""
    return _clip(signed * sharpness + 0.5, 0, 1)


def _wave(position: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between -0.25 and 0.25, highest at 0."""
    return np.abs(position - np.floor(position) - 0.5) - 0.25


# Textures: one mask over a garment, from positions across (-1 to 1) and along (0 to 1) it.

_PATTERN_MASKS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hem": lambda u, v: _soft(v - 0.66),
    "hoops": lambda u, v: _soft(_wave(v * 3)),
    "columns": lambda u, v: _soft(_wave(u * 1.25), 8),
    "checks": lambda u, v: _soft(_wave(v * 2.2) * _wave(u + 0.25), 60),
    "yoke": lambda u, v: _soft(0.36 - v),
    "panel": lambda u, v: _soft(0.36 - np.abs(u), 8),
    "halves": lambda u, v: _soft(u, 8),
    "sash": lambda u, v: _soft(0.4 - np.abs(u + 1.8 * v - 0.9), 8),
}
_LOWER_MASKS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "seam": lambda u, v: _soft(0.4 - np.abs(u), 5),
    "bands": lambda u, v: _soft(_wave(v * 4 + 0.3)),
    "cuffs": lambda u, v: _soft(v - 0.62),
}
# Of positions from the logo's centre, -1 to 1 within its square.
_LOGO_MASKS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: _soft(0.9 - x * x - y * y, 4),
    "bar": lambda x, y: _soft(np.minimum(1.35 - np.abs(x), 0.42 - np.abs(y)), 6),
    "cross": lambda x, y: _soft(
        np.maximum(np.minimum(0.3 - np.abs(x), 1.2 - np.abs(y)), np.minimum(1.1 - np.abs(x), 0.3 - np.abs(y))), 6
    ),
    "triangle": lambda x, y: _soft(np.minimum(0.5 + 0.5 * y - np.abs(x), 1 - y), 6),
    "ring": lambda x, y: _soft(0.36 - np.abs(x * x + y * y - 0.84), 4),
}


def _blend(base: np.ndarray, mask: np.ndarray, color: Color) -> np.ndarray:
    return base + mask * (_planes(color) - base)


def _torso_texture(person: Identity, view: Camera, turn: float) -> Texture:
    mirror = -1 if view.facing == "back" else 1

    def texture(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        shading = 1 - 0.22 * np.abs(u)
        u = mirror * (u - turn)
        paint = _planes(person.upper)
        if person.pattern in _PATTERN_MASKS:
            paint = _blend(paint, _PATTERN_MASKS[person.pattern](u, v), person.accent)
        if person.logo != "none":
            mask = _LOGO_MASKS[person.logo](u / 0.6, (v - person.logo_level) / 0.21)
            paint = _blend(paint, mask, opposite(person.upper))
        return paint * shading

    return texture


def _pack_texture(person: Identity) -> Texture:
    mask = _LOGO_MASKS[person.logo]
    return lambda u, v: _blend(_planes(person.bag_color), mask(u / 0.75, (v - 0.5) / 0.4), opposite(person.bag_color))


def _lower_texture(person: Identity, shade: float, start: float, end: float) -> Texture:
    def texture(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        paint = _planes(person.lower)
        if person.lower_pattern in _LOWER_MASKS:
            mask = _LOWER_MASKS[person.lower_pattern](u, start + v * (end - start))
            paint = _blend(paint, mask, opposite(person.lower))
        return paint * (shade - 0.2 * np.abs(u))

    return texture


class _Frame:
    """Where a body, of height 1 and with its middle at 0 across, lies in an image."""

    def __init__(self, canvas: np.ndarray, view: Camera, random: Random):
        self.canvas = canvas
        self.size = 112 * (1 + random.around(0.06 * MISALIGNMENT))
        self.middle = WIDTH / 2 + random.around(3.5 * MISALIGNMENT)
        self.top = (HEIGHT - self.size) / 2 + random.around(4.5 * MISALIGNMENT)
        self.tilt = view.tilt

    def _to_pixels(self, point: Point) -> Point:
        x, y = point
        return (
            self.middle + self.size * x * (1 + self.tilt * (0.5 - y)),
            self.top + self.size * y * (1 + self.tilt * (1 - y)),
        )

    def draw(self, start: Point, end: Point, widths: float | tuple[float, float], color: Color | None = None,
             *, flat: bool = False, texture: Texture | None = None) -> None:
        first, last = widths if isinstance(widths, tuple) else (widths, widths)
        _draw_limb(self.canvas, self._to_pixels(start), self._to_pixels(end), (first * self.size, last * self.size),
                   color, flat=flat, texture=texture)

    def draw_block(self, top: Point, height: float, half: float, color: Color) -> None:
        """A bag: outlined, so that it shows on clothes of its own colour."""
        x, y = top
        self.draw((x, y - 0.012), (x, y + height + 0.012), half + 0.012, opposite(color), flat=True)
        self.draw((x, y), (x, y + height), half, color, flat=True)


def _draw_body(frame: _Frame, person: Identity, view: Camera, random: Random) -> None:
    habit, stance, stoop = HABITS[person.habit]
    build, (shoulder_width, hip_width) = BUILDS[person.build], FIGURES[person.figure]
    hips, head_size = PROPORTIONS[person.proportion]
    toward = random.pick((-1, 1)) if view.facing == "side" else (1 if view.turn >= 0 else -1)
    turn = toward * abs(view.turn) + random.around(0.12 * POSE_JITTER)
    side = -person.bag_side if view.facing == "back" else person.bag_side
    width = 1 - 0.55 * abs(turn)
    shoulder, hip = 0.118 * build * shoulder_width * width, 0.108 * build * hip_width * width
    lean = random.around(0.015 * POSE_JITTER) + stoop * toward
    hem = hips + (0.14 if person.coat == "long" else 0.015)
    pelvis, skirt = _lower_texture(person, 1, 0, 0.1), _lower_texture(person, 1, 0, 1)

    _draw_legs(frame, person, view, random, hips, 0.7 * hip, stance, toward)
    frame.draw((0, hips - 0.05), (0, hips + 0.05), (hip * 0.95, hip), texture=pelvis, flat=True)
    if person.garment == "skirt":
        frame.draw((0, hips - 0.05), (0, hips + 0.25), (hip, hip * 1.4), texture=skirt, flat=True)
    if person.bag == "backpack" and view.facing != "back":
        behind = -toward * (shoulder + 0.02) if view.facing == "side" else 0.0
        frame.draw_block((behind, 0.2), 0.25, 0.07 if behind else shoulder + 0.045, person.bag_color)
    arms = _place_arms(habit, random, side, shoulder, hip, lean)
    if view.facing == "side":
        _draw_arm(frame, person, arms[0], 0.7)
    frame.draw((lean, 0.17), (0, hem), (shoulder, hip * 1.08), texture=_torso_texture(person, view, turn), flat=True)
    for arm in arms if view.facing != "side" else arms[1:]:
        _draw_arm(frame, person, arm, 0.84)
    _draw_bag(frame, person, view, side, shoulder, hip, hips, lean, arms)
    _draw_head(frame, person, view, toward, (lean * 1.5, 0.085 + stoop * 0.6), head_size)


def _draw_legs(frame: _Frame, person: Identity, view: Camera, random: Random, hips: float, hip: float,
               stance: float, toward: int) -> None:
    build = BUILDS[person.build]
    middle = random.around(0.02 * POSE_JITTER)
    order = random.pick((-1, 1))
    for leg, shade in ((order, 0.8), (-order, 1.0)):
        start = (leg * hip * 0.62, hips + 0.02)
        lift = 0.0 if shade == 1 else random.between(0, 0.03 * POSE_JITTER)
        ankle = (middle + leg * (stance + random.around(0.02 * POSE_JITTER)), 0.945 - lift)
        bend = toward * random.between(0, 0.03 * POSE_JITTER) if view.facing == "side" else leg * 0.004
        knee = ((start[0] + ankle[0]) / 2 + bend, (start[1] + ankle[1]) / 2)
        if person.garment == "trousers":
            frame.draw(start, knee, (0.056 * build, 0.05 * build), texture=_lower_texture(person, shade, 0, 0.5))
            frame.draw(knee, ankle, (0.05 * build, 0.045 * build), texture=_lower_texture(person, shade, 0.5, 1))
        else:
            frame.draw(start, knee, (0.045 * build, 0.036 * build), _shade(person.skin, shade))
            frame.draw(knee, ankle, (0.036 * build, 0.028 * build), _shade(person.skin, shade))
            if person.garment == "shorts":
                leg_texture = _lower_texture(person, shade, 0, 1)
                frame.draw(start, knee, (0.06 * build, 0.064 * build), texture=leg_texture, flat=True)
        color, trim = (WHITE, BLACK) if person.shoes.startswith("white") else (BLACK, WHITE)
        x, y = ankle
        if person.shoes.endswith("boots"):
            frame.draw((x, y - 0.115), (x, y - 0.09), 0.05 * build, trim, flat=True)
            frame.draw((x, y - 0.09), (x, y), 0.046 * build, color, flat=True)
        toe = toward * 0.055 if view.facing == "side" else leg * 0.02
        frame.draw((x - toe / 3, y + 0.028), (x + toe, y + 0.03), 0.036, trim)
        frame.draw((x - toe / 3, y + 0.018), (x + toe, y + 0.02), 0.034, color)


Arm = tuple[Point, Point, Point]  # shoulder, elbow, hand


def _place_arms(habit: str, random: Random, side: int, shoulder: float, hip: float, lean: float) -> list[Arm]:
    """The arms at the camera's left and right, when a bag would be at `side`."""
    arms = []
    for arm in (-1, 1):
        sway, lift = random.around(0.02 * POSE_JITTER), random.around(0.012 * POSE_JITTER)
        top = (lean + arm * (shoulder - 0.005), 0.205)
        elbow, hand = (top[0] + arm * 0.028 + sway, 0.345 + lift), (top[0] + arm * 0.025 + 2 * sway, 0.47 + lift)
        if habit == "akimbo":
            elbow, hand = (top[0] + arm * 0.105, 0.315 + lift), (arm * (hip + 0.01), 0.42 + lift)
        elif habit == "phone" and arm != side:
            elbow, hand = (top[0] + arm * 0.085, 0.29 + lift), (lean + arm * 0.085, 0.115 + lift)
        elif habit == "holding":
            elbow, hand = (top[0] + arm * 0.03, 0.36 + lift), (arm * 0.02, 0.45 + lift)
        elif habit == "swing":
            elbow, hand = (top[0] + arm * 0.055 + sway, 0.3 + lift), (top[0] + arm * 0.095 + sway, 0.4 + lift)
        arms.append((top, elbow, hand))
    return arms


def _draw_arm(frame: _Frame, person: Identity, arm: Arm, shade: float) -> None:
    build = BUILDS[person.build]
    shoulder, elbow, hand = arm
    sleeve = _shade(person.accent if person.pattern == "sleeves" else person.upper, shade)
    skin = _shade(person.skin, 0.95)
    forearm = skin if person.sleeves == "short" else sleeve
    frame.draw(hand, (hand[0], hand[1] + 0.012), 0.03, skin)
    frame.draw(elbow, hand, (0.034 * build, 0.028 * build), forearm)
    frame.draw(shoulder, elbow, (0.042 * build, 0.038 * build), sleeve)


def _draw_bag(frame: _Frame, person: Identity, view: Camera, side: int, shoulder: float, hip: float, hips: float,
              lean: float, arms: list[Arm]) -> None:
    color = person.bag_color
    if person.bag == "backpack":
        if view.facing == "back":
            half = 0.72 * max(shoulder, hip)
            frame.draw_block((lean, 0.2), 0.21, half, color)
            if person.logo != "none":  # the pack hides the one on the clothes
                frame.draw((lean, 0.2), (lean, 0.41), half, texture=_pack_texture(person), flat=True)
        else:
            for strap in (-0.62, 0.62):
                frame.draw((lean + strap * shoulder, 0.175), (strap * shoulder, 0.4), 0.018, color, flat=True)
    elif person.bag == "shoulder":
        frame.draw((lean - side * shoulder * 0.8, 0.175), (side * hip, hips - 0.05), 0.017, color)
        frame.draw_block((side * (hip + 0.01), hips - 0.06), 0.12, 0.068, color)
    elif person.bag == "handbag":
        hand = arms[(side + 1) // 2][2]
        frame.draw(hand, (hand[0], hand[1] + 0.06), 0.012, color)
        frame.draw_block((hand[0], hand[1] + 0.06), 0.13, 0.062, color)


def _draw_head(frame: _Frame, person: Identity, view: Camera, toward: int, center: Point, size: float) -> None:
    x, y = center
    radius = 0.06 * size
    hair = person.hair_color
    face = (x + (0.35 * radius * toward if view.facing == "side" else 0), y + 0.25 * radius)
    frame.draw((x, y), (x, 0.175), radius * 0.5, _shade(person.skin, 0.8))
    if person.hair == "long":
        frame.draw((x, y), (x, y + 0.13), (radius * 1.25, radius * 1.35), hair, flat=True)
    elif person.hair == "bun":
        frame.draw((x, y - 1.45 * radius), (x, y - 1.4 * radius), radius * 0.65, hair)
    frame.draw((x, y - 0.15 * radius), (x, y), radius * (1.65 if person.hair == "afro" else 1.14), hair)
    if view.facing == "back":
        frame.draw((x, y + 0.6 * radius), (x, y + 0.62 * radius), radius * 0.75, hair)
    else:
        frame.draw(face, (face[0], face[1] + 0.3 * radius), (radius * 0.92, radius * 0.75), person.skin)
    if person.hair == "hat":
        brim = toward * radius * 0.5 if view.facing == "side" else 0
        frame.draw((x, y - 0.5 * radius), (x, y - 0.95 * radius), (radius * 1.15, radius * 0.9), person.accent)
        frame.draw((x - 1.5 * radius + brim, y - 0.4 * radius), (x + 1.5 * radius + brim, y - 0.4 * radius),
                   radius * 0.28, person.accent)


def _draw_background(view: Camera, random: Random) -> np.ndarray:
    """[3, H, W]: wall and floor, clutter in the colours of clothes, passers-by in the distance."""
    canvas = np.empty((3, HEIGHT, WIDTH), np.float32)
    floor = int(HEIGHT * (view.horizon + random.around(0.05)))
    wall = random.pick(UPPER_COLORS), random.between(90, 190)
    canvas[:, :floor] = _planes(_muted(*wall)) * (1.1 - 0.3 * _ROWS[:floor] / HEIGHT)
    ground = _planes(_muted(random.pick(LOWER_COLORS), random.between(80, 170)))
    canvas[:, floor:] = ground * (0.75 + 0.35 * _ROWS[floor:] / HEIGHT)
    for _ in range(CLUTTER):
        left, right = (max(int(edge), 0) for edge in random.span((-12, WIDTH), (5, 26)))
        top, bottom = (min(max(int(edge), 0), floor) for edge in random.span((-20, floor), (8, 60)))
        color = _muted(random.pick(UPPER_COLORS + LOWER_COLORS), 128)
        canvas[:, top:bottom, left:right] = _planes(color)
    if random.chance(0.4):
        x, foot, size = random.between(-4, WIDTH + 4), floor + random.between(2, 12), random.between(30, 60)
        for level, end, half, palette in ((0.5, 1, 0.1, LOWER_COLORS), (0.25, 0.5, 0.14, UPPER_COLORS),
                                          (0.08, 0.1, 0.08, SKIN_COLORS)):
            _draw_limb(canvas, (x, foot - size * (1 - level)), (x, foot - size * (1 - end)), (half * size, half * size),
                       random.pick(palette))
    return canvas


def _muted(color: Color, grey: float) -> Color:
    """Half the colour, half a grey: backgrounds hold the clothes' colours without their brightness."""
    return tuple(0.5 * channel + 0.5 * grey for channel in color)


def _draw_occluder(canvas: np.ndarray, random: Random) -> None:
    color = random.pick(UPPER_COLORS + LOWER_COLORS)
    kind = random.pick(("pole", "bollard", "passer-by"))
    if kind == "pole":
        x = random.between(8, WIDTH - 8)
        _draw_limb(canvas, (x, -4), (x, HEIGHT + 4), (3.0, 3.0), color, flat=True)
    elif kind == "bollard":
        x, top = random.between(4, WIDTH - 4), random.between(0.72, 0.86) * HEIGHT
        _draw_limb(canvas, (x, top), (x, HEIGHT + 12), (10.0, 10.0), color)
    else:
        x = random.pick((-3.0, WIDTH + 3.0))
        _draw_limb(canvas, (x, 0.32 * HEIGHT), (x, HEIGHT + 8), (12.0, 14.0), color)
        _draw_limb(canvas, (x, 0.17 * HEIGHT), (x, 0.19 * HEIGHT), (8.0, 8.0), random.pick(SKIN_COLORS))


def _expose(canvas: np.ndarray, view: Camera, random: Random) -> np.ndarray:
    """What the camera's optics and sensor make of canvas [3, H, W]: uint8 [H, W, 3]."""
    weight = view.blur * BLUR * random.between(0.6, 1.4)
    for planes in (canvas, canvas.transpose(0, 2, 1)):
        planes[:, 1:-1] += weight * (planes[:, :-2] + planes[:, 2:] - 2 * planes[:, 1:-1])

    def cast(value: float, neutral: float) -> float:
        return neutral + CAST_STRENGTH * (value - neutral) + random.around(CAST_JITTER)

    saturation, tone, contrast = cast(view.saturation, 1), cast(view.tone, 0), cast(view.contrast, 1)
    gains = _planes([cast(gain, 1) / 255 for gain in view.gains])
    light = 1 + random.around(CAST_JITTER) * (_COLUMNS / (WIDTH / 2) - 1)  # from one side
    grey = (0.3 * canvas[0] + 0.6 * canvas[1] + 0.1 * canvas[2]) * (1 - saturation)
    canvas *= saturation
    canvas += grey
    canvas *= gains
    canvas = _clip(canvas, 0, 1)
    canvas *= 1 + tone - tone * canvas
    canvas *= (255 * contrast) * light
    canvas += (127.5 * (1 - contrast)) * light + 0.5
    # Differences of two bytes of the generator: no version of NumPy draws them otherwise. Their deviation is 104.5.
    raw = random.bits.random_raw(canvas.size // 4).astype("<u8", copy=False).view(np.uint8).astype(np.float32)
    raw *= view.noise * NOISE / 104.5
    canvas += (raw[: canvas.size] - raw[canvas.size :]).reshape(canvas.shape)
    return np.ascontiguousarray(_clip(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0))
