"""Charts of lines as values, which pages and pictures draw alike."""

import math
from dataclasses import dataclass

FEW_POINTS = 40
"""Points up to which a line has a mark at each."""


@dataclass(frozen=True)
class Line:
    """One line of a panel, or single marks where there are few points."""

    name: str
    x: list[float]
    y: list[float]
    is_main: bool

    @property
    def has_marks(self) -> bool:
        return len(self.x) <= FEW_POINTS


@dataclass(frozen=True)
class Panel:
    """One chart of lines over `axis`.

    `best` is a point that is marked, (step, score) of the best checkpoint; `ends` are those of the upright axis, None
    where the lines give them.
    """

    title: str
    lines: tuple[Line, ...]
    best: tuple[float, float] | None = None
    axis: str = "step"
    ends: tuple[float, float] | None = None

    @property
    def limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Least and largest x, and the same of y, of everything that is drawn."""
        points = [point for line in self.lines for point in zip(line.x, line.y, strict=True)]
        points += [self.best] if self.best else []
        x, y = zip(*points, strict=True)
        return (min(x), max(x)), self.ends or (min(y), max(y))


def nice_ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Return about `number` round values, 1, 2 or 5 times a power of ten apart, inside [low, high].

    Raises:
        ValueError: the ends are not finite, or high is below low.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"`low` and `high` must be finite and in this order, got {low} and {high}.")
    if low == high:
        return [low]
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]
