"""Image files to (3, H, W) uint8 tensors; what cannot be read is skipped by name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

THREADS = 8
NAMED = 10  # warnings of their own; the rest is counted
BAR_FROM = 2000  # files


def decode(path: Path) -> torch.Tensor:
    """One image file as (3, H, W) uint8, turned as its EXIF orientation says.

    Grey and palette images become RGB, 16-bit grey is scaled to 8, transparency is laid on white.

    Raises:
        OSError, ValueError, SyntaxError: the file is no image that PIL can read.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            assert upright is not None
            return torch.from_numpy(_rgb(upright)).permute(2, 0, 1).contiguous()


def _rgb(image: Image) -> np.ndarray[Any, Any]:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits a pixel
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else max(float(values.max(initial=0)), 1.0)
        grey = np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return np.array(image.convert("RGB"))


class ImageFiles(Sequence[torch.Tensor]):
    """Images that are decoded at each access: for sets that do not fit in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | ImageFiles:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        return decode(self.paths[index])


def read_images(
    paths: Sequence[Path], root: Path, memory_gib: float
) -> tuple[torch.Tensor | Sequence[torch.Tensor], list[int], list[str]]:
    """Decode every file once; keep the pixels if they fit.

    Args:
        paths: of the files, in the order of the result.
        root: names are given relative to it.
        memory_gib: the decoded images are kept up to this size; beyond it each access decodes.

    Returns:
        (images, kept, skipped): a (n, 3, H, W) uint8 tensor where all have one size and fit, else
        a sequence of (3, H, W); the indices into `paths` that could be read; the others' names
        with the reason. A warning names each, up to NAMED of them.
    """
    room = memory_gib * 2**30
    images: list[torch.Tensor | None] = []
    kept: list[int] = []
    skipped: list[str] = []
    for i, result in enumerate(_all(paths)):
        if isinstance(result, str):
            skipped.append(f"{paths[i].relative_to(root)} ({result})")
            continue
        kept.append(i)
        room -= result.numel()
        if room < 0:
            images.clear()
        images.append(result if room >= 0 else None)
    for name in skipped[:NAMED]:
        warnings.warn(f"skipped a broken image: {name}", stacklevel=2)
    if len(skipped) > NAMED:
        warnings.warn(f"skipped {len(skipped) - NAMED} more broken images", stacklevel=2)
    if room < 0:
        return ImageFiles([paths[i] for i in kept]), kept, skipped
    decoded = [image for image in images if image is not None]
    if decoded and all(image.shape == decoded[0].shape for image in decoded):
        return torch.stack(decoded), kept, skipped
    return decoded, kept, skipped


def _all(paths: Sequence[Path]) -> Iterator[torch.Tensor | str]:
    """Each file's pixels or the reason why not, in order; a few hundred are decoded ahead."""
    from tqdm import tqdm

    hidden = len(paths) < BAR_FROM or not sys.stderr.isatty()
    ahead = 256
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(paths), desc="reading images", file=sys.stderr, disable=hidden) as bar,
    ):
        for start in range(0, len(paths), ahead):
            for result in pool.map(_attempt(decode), paths[start : start + ahead]):
                bar.update()
                yield result


def _attempt(read: Callable[[Path], torch.Tensor]) -> Callable[[Path], torch.Tensor | str]:
    def attempt(path: Path) -> torch.Tensor | str:
        from PIL import UnidentifiedImageError

        try:
            return read(path)
        except UnidentifiedImageError:  # its text is the path again
            return "no image that can be read"
        except Exception as error:  # whatever a decoder makes of a broken file
            return " ".join(str(error).split()) or type(error).__name__

    return attempt
