"""Image files to (3, H, W) uint8 tensors; what cannot be read is skipped by name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from .data import Images

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

    with Image.open(path) as image:
        pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if most is not None and pixels > most:  # PIL warns, and refuses from twice as many on
            raise ValueError(f"{pixels:,} pixels, more than PIL's limit of {most:,}")
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


class Decoded(NamedTuple):
    """What `read_images` found: images, the indices of the files they came from, and the rest."""

    images: torch.Tensor | Sequence[torch.Tensor]
    kept: list[int]
    skipped: list[str]

    def split(self, first: int) -> tuple[tuple[Images, list[int]], tuple[Images, list[int]]]:
        """(images, kept) of the first `first` files, and of the others, counted from 0."""
        n = sum(i < first for i in self.kept)
        rest = [i - first for i in self.kept[n:]]
        return (self.images[:n], self.kept[:n]), (self.images[n:], rest)


def read_images(paths: Sequence[Path], root: Path, memory_gib: float) -> Decoded:
    """Decode every file once; keep the pixels if they fit.

    Args:
        paths: of the files, in the order of the result.
        root: names are given relative to it.
        memory_gib: the decoded images are kept up to this size; beyond it each access decodes.

    Returns:
        images: a (n, 3, H, W) uint8 tensor where all have one size and fit, else a sequence of
        (3, H, W); kept: the indices into `paths` that could be read; skipped: the others' names
        with the reason. A warning names each, up to NAMED of them.
    """
    room = memory_gib * 2**30
    whole: torch.Tensor | None = None  # filled in place: a stack would be a second copy
    images: list[torch.Tensor] = []
    kept: list[int] = []
    skipped: list[str] = []
    for i, result in enumerate(_all(paths)):
        if isinstance(result, str):
            skipped.append(f"{paths[i].relative_to(root)} ({result})")
            continue
        room -= result.numel()
        if room >= 0:
            if not kept:
                whole = torch.empty(len(paths), *result.shape, dtype=torch.uint8)
            elif whole is not None and result.shape != whole.shape[1:]:
                images, whole = [image.clone() for image in whole[: len(kept)]], None
            if whole is not None:
                whole[len(kept)] = result
            else:
                images.append(result)
        else:
            images, whole = [], None
        kept.append(i)
    for name in skipped[:NAMED]:
        warnings.warn(f"skipped a broken image: {name}", stacklevel=2)
    if len(skipped) > NAMED:
        warnings.warn(f"skipped {len(skipped) - NAMED} more broken images", stacklevel=2)
    if room < 0:
        return Decoded(ImageFiles([paths[i] for i in kept]), kept, skipped)
    return Decoded(images if whole is None else whole[: len(kept)], kept, skipped)


def _all(paths: Sequence[Path]) -> Iterator[torch.Tensor | str]:
    """Each file's pixels or the reason why not, in order; a few hundred are decoded ahead."""
    from PIL import Image
    from tqdm import tqdm

    hidden = len(paths) < BAR_FROM or not sys.stderr.isatty()
    ahead = 256
    with (
        warnings.catch_warnings(),  # once around the threads, which share the filters
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(paths), desc="reading images", file=sys.stderr, disable=hidden) as bar,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` refuses those
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
