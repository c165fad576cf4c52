"""metrics.jsonl: one JSON object a line, appended while training; TensorBoard on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import ConfigError

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Appends lines to `folder/metrics.jsonl`; without a folder it keeps nothing.

    A resumed run cuts the file at the length that its checkpoint knew, so that no step is there
    twice. A line reaches the file whole: a kill leaves at most a torn last line, which is cut.

    Args:
        folder: of the run, or None.
        length: bytes to keep of an earlier file.
        tensorboard: write scalars to `folder/tensorboard` too.
        first_step: where a resumed run goes on; TensorBoard drops what is recorded after it.

    Raises:
        ConfigError: TensorBoard asked for and not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        length: int,
        *,
        tensorboard: bool = False,
        first_step: int | None = None,
    ) -> None:
        self._file = self._board = None
        if folder is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "tensorboard", True, "the package tensorboard (pip install tensorboard)"
                ) from error
            # It drops what is at or after its step; what is at first_step is done.
            purge = None if first_step is None else first_step + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        path = folder / FILE_NAME
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115 (closed by __exit__)
        self._file.truncate(min(length, path.stat().st_size))
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, event: str, global_step: int, **values: Any) -> None:
        """One line `{"event": ..., "step": ..., ...}`; numbers go to TensorBoard as event/name."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "step": global_step} | values, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{event}/{name}", value, global_step)

    def sync(self) -> None:
        """What was written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return 0 if self._file is None else self._file.tell()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a torn last one; [] if there is no file."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in lines]
