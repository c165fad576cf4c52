"""How a drop-in says no."""

from typing import Any, NoReturn


def refuse(option: str, value: Any, served: str) -> NoReturn:
    """Raise what names the option, its value and what is served instead."""
    raise NotImplementedError(f"{option}={value!r} is not served here; served: {served}")
