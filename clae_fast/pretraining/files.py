"""Files appear whole or not at all; those of a run by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG, RESULT, ENCODER = "config.json", "result.json", "encoder.safetensors"
CHECKPOINTS = "checkpoints"


def holds_run(folder: Path) -> bool:
    """Whether a run left files here."""
    return any((folder / name).exists() for name in (CONFIG, RESULT, ENCODER, CHECKPOINTS))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` if the block succeeds.

    On an error or Ctrl-C the temporary file goes and an earlier `path` stays as it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, on the disk before it has that name."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def unwritable_reason(folder: Path) -> str | None:
    """Why files cannot be made in `folder` (which need not exist yet), or None.

    Tries it, since permission bits do not tell the whole truth, and takes away what it made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for path in missing:  # the deepest first
            if path.is_dir():
                path.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
