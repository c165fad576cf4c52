"""Any folder of images as a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .config import ConfigError
from .data import ImageData, Images, every_fifth
from .decode import read_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TEST_NAMES = ("test", "val")


def folder(path: Path, memory_gib: float = 4.0) -> ImageData:
    """The images below `path`, in one of three layouts.

    `train/<class>/...` and `test/<class>/...` (or `val`); `<class>/...`, of which every fifth
    image of each class by name is a test image; or images alone, without labels, all of them for
    training. Folders within a class count to it; hidden files and folders do not.

    Args:
        path: the folder.
        memory_gib: keep the decoded images in memory up to this size.

    Raises:
        ConfigError: nothing to train on, or a test class that is not among the training classes.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError("data_dir", path, f"a folder of images (it {what})")
    test_name = next((name for name in TEST_NAMES if (path / name).is_dir()), None)
    if test_name is not None and (path / "train").is_dir():
        return _split(path, path / "train", path / test_name, memory_gib)
    classes = _classes(path)
    if not classes:
        files = _images_in(path)
        _enough(path, files)
        images, kept, skipped = read_images(files, path, memory_gib)
        _enough(path, kept, skipped)
        return _data(images, None, torch.empty(0, 3, 1, 1, dtype=torch.uint8), None, skipped)
    files, labels = _labelled(classes, [c.name for c in classes])
    _enough(path, files)
    images, kept, skipped = read_images(files, path, memory_gib)
    _enough(path, kept, skipped)
    labels = labels[kept]
    test = every_fifth(labels)
    return _data(
        _chosen(images, ~test), labels[~test], _chosen(images, test), labels[test], skipped
    )


def _split(path: Path, train: Path, test: Path, memory_gib: float) -> ImageData:
    names = [c.name for c in _classes(train)]
    if not names:
        raise ConfigError("data_dir", train, "a sub-folder with images for each class")
    unknown = [c.name for c in _classes(test) if c.name not in names]
    if unknown:
        raise ConfigError("data_dir", test, f"the classes of train, and it also has {unknown[0]}")
    files, labels = _labelled(_classes(train), names)
    test_files, test_labels = _labelled(_classes(test), names)
    images, kept, skipped = read_images(files, path, memory_gib)
    _enough(train, kept, skipped)
    test_images, test_kept, test_skipped = read_images(test_files, path, memory_gib)
    return _data(
        images, labels[kept], test_images, test_labels[test_kept], [*skipped, *test_skipped]
    )


def _data(
    images: Images,
    labels: torch.Tensor | None,
    test_images: Images,
    test_labels: torch.Tensor | None,
    skipped: Sequence[str],
) -> ImageData:
    if test_labels is not None and len(test_labels) == 0:
        labels = test_labels = None  # nothing to evaluate on
    return ImageData("folder", images, labels, test_images, test_labels, MEAN, STD, tuple(skipped))


def _chosen(images: Images, mask: torch.Tensor) -> Images:
    if isinstance(images, torch.Tensor):
        return images[mask]
    from .decode import ImageFiles

    indices = mask.nonzero().flatten().tolist()
    if isinstance(images, ImageFiles):
        return ImageFiles([images.paths[i] for i in indices])
    return [images[i] for i in indices]


def _classes(path: Path) -> list[Path]:
    """Sub-folders with at least one image, by name."""
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(p for p in folders if _images_in(p))


def _labelled(classes: Sequence[Path], names: Sequence[str]) -> tuple[list[Path], torch.Tensor]:
    files: list[Path] = []
    labels: list[int] = []
    for each in classes:
        own = _images_in(each)
        files += own
        labels += [names.index(each.name)] * len(own)
    return files, torch.tensor(labels, dtype=torch.int64)


def _images_in(path: Path) -> list[Path]:
    """All image files below, by name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(
        p
        for p in path.rglob("*")
        if p.suffix.lower() in IMG_EXTENSIONS
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )


def _enough(path: Path, found: Sequence[object], skipped: Sequence[str] = ()) -> None:
    if len(found) < 2:
        broken = f"; {len(skipped)} could not be read, such as {skipped[0]}" if skipped else ""
        raise ConfigError(
            "data_dir", path, f"at least two images, and there are {len(found)}{broken}"
        )
