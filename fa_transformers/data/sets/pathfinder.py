"""Pathfinder-32 as Long Range Arena draws it: do two markers stand on one dashed curve?

A grey picture of 32 x 32 pixels holds two long snakes of dashes and some short ones that distract. A disc marks one end
of a long snake and another disc an end of the same snake (label 1) or of the other one (label 0), so that both classes
have the same ingredients. A model reads the 1,024 pixels row by row as tokens.

How a picture is drawn, lengths in pixels ("hard": 14 dashes):
- A dash is 2 long and 0.5 thick, drawn at twice the resolution and resampled. It occupies what lies within 1 of it.
- The first dash starts at least 14 from every side, the second snake's 7 away from it in a random direction; the
  angles are uniform. The two grow in turns, starting with the first.
- A snake grows from a pivot in the middle of the gap of 2 after its last dash. The new dash points from there to a
  pixel on the circle of radius 3 around it, which is its far end. Pixels are drawn with weights cos²(turn), 0 beyond
  90°, times how free they and their four neighbours are. A dash that touches an occupied place is drawn again, twice at
  most; then, or where no pixel is free, the picture starts anew.
- Five snakes of 4 dashes are added in free places; one that fails four times more is left out.
- Dashes of long snakes are 1.5 bright, of short ones 2, before resampling makes such thin lines darker; markers
  (radius 1.5) are 1. The picture is then stretched to bytes from 0 to 255, as the original's image writer did.

Rules: Tay et al. 2021, arXiv:2011.04006, after Linsley et al. 2018, arXiv:1805.08315, and the generator of the latter.
That one leaves both snakes' newest dashes out of what is occupied and takes the first dash's place from what a dash
shape leaves of the middle; here only a snake's own last dash is left out, and the place is uniform.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 32
DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}
OFFICIAL_SIZES = {"train": 160_000, "validation": 20_000, "test": 20_000}
LABEL_NAMES = ("apart", "connected")
DASH_PX, THICKNESS_PX, MARGIN_PX, PADDING_PX = 2, 0.5, 1, 1
SEED_DISTANCE_PX, MARKER_RADIUS_PX, ANTIALIAS = 7, 1.5, 2
LONG_BRIGHTNESS, SHORT_BRIGHTNESS, MARKER_BRIGHTNESS = 2 * 0.75, 2.0, 1.0
DASHES_OF_DISTRACTORS = 20
DASH_RETRIES, DISTRACTOR_RETRIES = 2, 4
OVERLAP = 1.8
REACH_PX = DASH_PX + math.ceil(THICKNESS_PX) + MARGIN_PX  # of a dash's drawing around its start
# Kept sets are found again by their settings; this number stands for the code, and goes up when the pictures change.
RECIPE = 1


class NoRoom(Exception):
    """A snake can't be drawn where it stands; its picture starts anew."""


@dataclass
class Snake:
    """A snake while it grows: the pixel (row, column) of its start, those of its dashes' ends, and where it goes on."""

    start: tuple[int, int]
    ends: list[tuple[int, int]]
    pivot: tuple[float, float]
    angle: float
    last_mask: np.ndarray


@dataclass
class Picture:
    """A drawn picture: bytes [32, 32], the label, the pixels of both markers, and the long snakes."""

    pixels: np.ndarray
    label: int
    markers: tuple[tuple[int, int], tuple[int, int]]
    snakes: tuple[Snake, Snake]


@functools.lru_cache(maxsize=1024)
def draw_dash(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """A dash that starts in the middle of its drawing, and what it occupies: two arrays [9, 9] of numbers 0 to 1."""
    side = 2 * REACH_PX * ANTIALIAS + 1
    middle = REACH_PX * ANTIALIAS
    end_row, end_column = move((middle, middle), math.radians(degrees), DASH_PX * ANTIALIAS)
    fine = Image.new("L", (side, side))
    line = [(middle, middle), (round(end_column), round(end_row))]
    ImageDraw.Draw(fine).line(line, fill=255, width=round(THICKNESS_PX * ANTIALIAS))
    reach = MARGIN_PX * ANTIALIAS
    padded = np.pad(np.asarray(fine), reach)
    disc = [
        (row, column)
        for row in range(-reach, reach + 1)
        for column in range(-reach, reach + 1)
        if row**2 + column**2 <= reach**2
    ]
    shifted = [padded[reach + r : reach + r + side, reach + c : reach + c + side] for r, c in disc]
    return _shrink(np.asarray(fine)), _shrink(np.max(shifted, axis=0))


def _shrink(fine: np.ndarray) -> np.ndarray:
    """Resample bytes to one pixel where there were about `ANTIALIAS`, as numbers from 0 to 1."""
    side = len(fine) // ANTIALIAS + len(fine) % ANTIALIAS
    return np.asarray(Image.fromarray(fine).resize((side, side), Image.Resampling.LANCZOS)) / 255.0


@functools.cache
def circle_offsets() -> np.ndarray:
    """Places on the circle around a pivot, one for each pixel of its circumference: [places, 2] (rows, columns)."""
    radius = DASH_PX + MARGIN_PX
    angles = np.arange(0.0, 2 * np.pi, 1 / radius)
    return radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)


def draw_marker(place: tuple[int, int]) -> np.ndarray:
    """A disc in an otherwise black picture [32, 32], of numbers from 0 to 1."""
    rows, columns = np.ogrid[: SIZE_PX * ANTIALIAS, : SIZE_PX * ANTIALIAS]
    distance = (rows - place[0] * ANTIALIAS) ** 2 + (columns - place[1] * ANTIALIAS) ** 2
    return _shrink(np.where(distance <= (MARKER_RADIUS_PX * ANTIALIAS) ** 2, 255, 0).astype(np.uint8))


def move(place: tuple[float, float], angle: float, distance: float) -> tuple[float, float]:
    """(row, column) after `distance` in the direction `angle`; 0 is to the right, π/2 down."""
    return place[0] + distance * math.sin(angle), place[1] + distance * math.cos(angle)


def _stamp(canvas: np.ndarray, stamp: np.ndarray, place: tuple[int, int]) -> None:
    """Raise `canvas` to `stamp` around `place`; what lies outside is left out."""
    top, left = place[0] - REACH_PX, place[1] - REACH_PX
    rows = slice(max(0, top), max(0, min(SIZE_PX, top + len(stamp))))
    columns = slice(max(0, left), max(0, min(SIZE_PX, left + len(stamp))))
    part = stamp[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    np.maximum(canvas[rows, columns], part, out=canvas[rows, columns])


class Drawing:
    """The picture so far and what is occupied."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.image = np.zeros((SIZE_PX, SIZE_PX))
        self.mask = np.ones((SIZE_PX, SIZE_PX))
        self.mask[PADDING_PX:-PADDING_PX, PADDING_PX:-PADDING_PX] = 0.0

    def add_dash(self, place: tuple[int, int], angle: float, brightness: float) -> np.ndarray:
        """Draw a dash from `place`, unless it touches an occupied place; returns what it occupies.

        Raises:
            NoRoom: it does.
        """
        line, occupied = draw_dash(round(math.degrees(angle)) % 360)
        mask = np.zeros_like(self.mask)
        _stamp(mask, occupied, place)
        if (self.mask + mask).max() >= OVERLAP:
            raise NoRoom
        _stamp(self.image, line * brightness, place)
        return mask

    def begin(self, start: tuple[int, int], brightness: float) -> Snake:
        """The first dash of a snake, in a random direction."""
        angle = math.radians(self.random.integers(-180, 180))
        mask = self.add_dash(start, angle, brightness)
        end = move(start, angle, DASH_PX)
        return Snake(start, [(round(end[0]), round(end[1]))], move(start, angle, -MARGIN_PX), angle, mask)

    def extend(self, snake: Snake, brightness: float, others: np.ndarray | None = None) -> None:
        """Add a dash to `snake`. `others`: what else is occupied.

        Raises:
            NoRoom: there is no free pixel ahead, or the retries ran out.
        """
        pivot = move(snake.pivot, snake.angle, DASH_PX + 2 * MARGIN_PX)
        circle = np.floor(np.array(pivot) + circle_offsets() + 0.5).astype(int)
        circle = circle[((circle >= PADDING_PX) & (circle < SIZE_PX - PADDING_PX)).all(axis=1)]
        rows, columns = np.divmod(np.unique(circle @ (SIZE_PX, 1)), SIZE_PX)
        angles = np.arctan2(rows - pivot[0], columns - pivot[1])
        turns = np.abs((angles - snake.angle + np.pi) % (2 * np.pi) - np.pi)
        occupied = self.mask if others is None else np.maximum(self.mask, others)
        near = [occupied[rows + r, columns + c] for r, c in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))]
        weights = (np.cos(np.minimum(turns, np.pi / 2)) ** 2 * (1 - np.max(near, axis=0))).cumsum()
        if not len(weights) or weights[-1] < 1e-4:
            raise NoRoom
        kept, self.mask = self.mask, occupied
        try:
            for retry in range(DASH_RETRIES + 1):
                chosen = np.searchsorted(weights, self.random.random() * weights[-1], side="right")
                end, angle = (int(rows[chosen]), int(columns[chosen])), float(angles[chosen])
                try:
                    mask = self.add_dash(end, angle + np.pi, brightness)
                    break
                except NoRoom:
                    if retry == DASH_RETRIES:
                        raise
        finally:
            self.mask = kept
        self.mask = np.maximum(self.mask, snake.last_mask)
        snake.ends.append(end)
        snake.pivot, snake.angle, snake.last_mask = pivot, angle, mask

    def add_long_snakes(self, num_dashes: int) -> tuple[Snake, Snake]:
        """The two snakes that may carry markers. Raises NoRoom where they don't fit."""
        low, high = 2 * SEED_DISTANCE_PX, SIZE_PX - 2 * SEED_DISTANCE_PX
        row, column = (int(number) for number in self.random.integers(low, high, size=2))
        first = self.begin((row, column), LONG_BRIGHTNESS)
        row, column = (round(p) for p in move((row, column), self.random.uniform(0, 2 * np.pi), SEED_DISTANCE_PX))
        second = self.begin((row, column), LONG_BRIGHTNESS)
        for _ in range(num_dashes - 1):
            self.extend(first, LONG_BRIGHTNESS, second.last_mask)
            self.extend(second, LONG_BRIGHTNESS, first.last_mask)
        self.mask = np.max([self.mask, first.last_mask, second.last_mask], axis=0)
        return first, second

    def add_distractor(self, num_dashes: int) -> None:
        """A short snake somewhere free; nothing where the retries run out."""
        for _ in range(DISTRACTOR_RETRIES + 1):
            free = np.argwhere(self.mask < 0.3)
            if not len(free):
                return
            image, mask = self.image.copy(), self.mask
            try:
                row, column = free[self.random.integers(len(free))]
                snake = self.begin((int(row), int(column)), SHORT_BRIGHTNESS)
                for _ in range(num_dashes - 1):
                    self.extend(snake, SHORT_BRIGHTNESS)
                self.mask = np.maximum(self.mask, snake.last_mask)
                return
            except NoRoom:
                self.image, self.mask = image, mask


def draw_picture(random: np.random.Generator, difficulty: str = "hard") -> Picture:
    """One picture with a fair label.

    Raises:
        ValueError: the difficulty is not one of `DIFFICULTIES`.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"`difficulty` must be one of {tuple(DIFFICULTIES)}, got {difficulty!r}.")
    num_dashes = DIFFICULTIES[difficulty]
    label, marked = (int(number) for number in random.integers(2, size=2))
    while True:
        drawing = Drawing(random)
        try:
            snakes = drawing.add_long_snakes(num_dashes)
            break
        except NoRoom:
            continue
    for _ in range(DASHES_OF_DISTRACTORS // (num_dashes // 3)):
        drawing.add_distractor(num_dashes // 3)
    markers = snakes[marked].start, snakes[marked if label else 1 - marked].ends[-1]
    for marker in markers:
        np.maximum(drawing.image, draw_marker(marker) * MARKER_BRIGHTNESS, out=drawing.image)
    pixels = np.round(drawing.image * (255 / drawing.image.max())).astype(np.uint8)
    return Picture(pixels, label, markers, snakes)


def generate_pictures(rows: list[range], split_number: int, difficulty: str, seed: int, recipe: int) -> Iterator[dict]:
    """Yield rows with "pixels" (1,024 bytes, row by row) and "label"; row i depends on split, seed and i alone."""
    if recipe != RECIPE:
        raise ValueError(f"recipe must be {RECIPE}, the only one that this version draws, got {recipe}")
    for part in rows:
        for row in part:
            picture = draw_picture(np.random.default_rng([seed, split_number, row]), difficulty)
            yield {"pixels": picture.pixels.flatten(), "label": picture.label}


def load_pathfinder(
    sizes: dict[str, int] | None = None,
    seed: int = 0,
    *,
    difficulty: str = "hard",
    num_proc: int = 1,
    cache_dir: str | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels [pictures, 1024] and labels of each split, as bytes.

    Drawn once, by `num_proc` processes, and kept by `datasets` in `cache_dir`, by default in Hugging Face's cache. The
    sizes are the official ones by default; a smaller split is the beginning of a larger one.

    Raises:
        ValueError: a size is below 1, or the difficulty is unknown.
    """
    sizes = dict(OFFICIAL_SIZES if sizes is None else sizes)
    if min(sizes.values()) < 1:
        raise ValueError(f"`sizes` must be at least 1 each, got {sizes}.")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"`difficulty` must be one of {tuple(DIFFICULTIES)}, got {difficulty!r}.")
    features = datasets.Features(
        {"pixels": datasets.Sequence(datasets.Value("uint8"), length=SIZE_PX**2), "label": datasets.Value("int64")}
    )
    splits = {}
    for split, size in sizes.items():
        shards = [range(start, min(size, start + 256)) for start in range(0, size, 256)]
        rows = datasets.Dataset.from_generator(
            generate_pictures,
            features=features,
            cache_dir=cache_dir,
            num_proc=min(num_proc, len(shards)) if num_proc > 1 else None,
            gen_kwargs={
                "rows": shards,
                "split_number": list(OFFICIAL_SIZES).index(split),
                "difficulty": difficulty,
                "seed": seed,
                "recipe": RECIPE,
            },
        ).with_format("numpy", dtype=np.uint8)
        splits[split] = rows["pixels"][:], rows["label"][:]
    return splits
