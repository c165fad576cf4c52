"""Checks of the fields of settings, and their one error. Imports no torch."""

from __future__ import annotations

import math
import numbers


class ConfigError(ValueError):
    """A setting outside its range: which one, its value, and what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}={value!r}: expected {expected}")
        self.field, self.value, self.expected = field, value, expected


class FieldChecks:
    """Each check names the field in its ConfigError."""

    def _flag(self, field: str) -> None:
        if not isinstance(getattr(self, field), bool):
            raise ConfigError(field, getattr(self, field), "True or False")

    def _one_of(self, field: str, words: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in words:
            raise ConfigError(field, value, "one of " + ", ".join(words))

    def _whole(self, field: str, low: int, note: str = "", below: float = math.inf) -> None:
        value = getattr(self, field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value < below:
            raise ConfigError(field, value, f"a whole number of at least {low}{note}")

    def _number(
        self, field: str, above: float | None = None, at_least: float | None = None
    ) -> None:
        value = getattr(self, field)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if number and not isinstance(value, (int, float)):
            object.__setattr__(self, field, float(value))  # NumPy's: JSON must keep it
        bound = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
        if (
            not number
            or not math.isfinite(value)
            or (above is not None and value <= above)
            or (at_least is not None and value < at_least)
        ):
            raise ConfigError(field, value, f"a finite number {bound}")

    def _at_most(self, field: str, high: float, bound: str = "of at most") -> None:
        value = getattr(self, field)
        if value > high or (bound == "below" and value == high):
            raise ConfigError(field, value, f"a number {bound} {high:g}")
