"""A line through measurements of which older ones fade; pure."""

from __future__ import annotations

MEMORY_STEPS = 50.0  # how many measurements back count
PRIOR_WEIGHT = 0.5  # of each of the two points that are assumed before anything is measured


class LineFit:
    """Seconds over an amount (tokens, rows) by least squares, in which each measurement counts more than those before.

    Begins as the line of `at_zero` seconds and `per_item` more for each item, known at the amounts `near` and `far`.
    """

    def __init__(self, at_zero: float, per_item: float, near: float, far: float) -> None:
        self._sums = [0.0] * 5  # weight, amount, seconds, amount squared, amount times seconds
        for amount in (near, far):
            self._put(amount, at_zero + per_item * amount, PRIOR_WEIGHT)

    def add(self, amount: float, seconds: float) -> None:
        """One measurement."""
        fade = 1 - 1 / MEMORY_STEPS
        self._sums = [total * fade for total in self._sums]
        self._put(amount, seconds, 1.0)

    def line(self) -> tuple[float, float]:
        """(seconds at zero, seconds per item), neither below 0."""
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        mean_amount, mean_seconds = x / weight, y / weight
        slope = 0.0 if spread <= 0 else max(0.0, (weight * xy - x * y) / spread)
        if mean_amount > 0:
            slope = min(slope, mean_seconds / mean_amount)
        return mean_seconds - slope * mean_amount, slope

    def seconds(self, amount: float) -> float:
        """Of so many items."""
        at_zero, per_item = self.line()
        return at_zero + per_item * amount

    def _put(self, amount: float, seconds: float, weight: float) -> None:
        for place, value in enumerate((1.0, amount, seconds, amount * amount, amount * seconds)):
            self._sums[place] += weight * value
