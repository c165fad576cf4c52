"""Any folder of images as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from .config import ConfigError
from .data import ImageData, Images, every_fifth
from .decode import read_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TEST_NAMES = ("test", "val", "valid", "validation")


def folder(path: Path, memory_gib: float = 4.0) -> ImageData:
    """The images below `path`, in one of three layouts.

    `train/<class>/...` and `test/<class>/...` (or `val`, `valid`, `validation`);
    `<class>/...`, of which every fifth file of each class by name is a test image; or images
    alone, without labels, all of them for training. Folders within a class count to it; hidden
    files and folders do not. Images beside class folders belong to no class: they are left out,
    with a warning.

    Args:
        path: the folder.
        memory_gib: keep the decoded images, of both splits together, in memory up to this size.

    Raises:
        ConfigError: nothing to train on, or a test class that is not among the training classes.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError("data_dir", path, f"a folder of images (it {what})")
    tests = [path / name for name in TEST_NAMES if (path / name).is_dir()]
    if tests and (path / "train").is_dir():
        test = next((folder for folder in tests if _classes(folder)), tests[0])
        return _split(path, path / "train", test, memory_gib)
    classes = _classes(path)
    if not classes:
        files = _images_in(path)
        _enough(path, files)
        images, kept, skipped = read_images(files, path, memory_gib)
        _enough(path, kept, skipped)
        return _data(images, None, torch.empty(0, 3, 1, 1, dtype=torch.uint8), None, skipped)
    beside = _left_out(path)
    files, labels = _labelled(classes, [c.name for c in classes])
    _enough(path, files)
    is_test = every_fifth(labels)
    order = torch.cat(((~is_test).nonzero(), is_test.nonzero())).flatten()
    files, labels = [files[i] for i in order.tolist()], labels[order]
    return _both(path, files, labels, int((~is_test).sum()), memory_gib, beside)


def _split(path: Path, train: Path, test: Path, memory_gib: float) -> ImageData:
    names = [c.name for c in _classes(train)]
    if not names:
        raise ConfigError("data_dir", train, "a sub-folder with images for each class")
    unknown = [c.name for c in _classes(test) if c.name not in names]
    if unknown:
        raise ConfigError("data_dir", test, f"the classes of train, and it also has {unknown[0]}")
    beside = [*_left_out(train), *_left_out(test)]
    files, labels = _labelled(_classes(train), names)
    test_files, test_labels = _labelled(_classes(test), names)
    labels = torch.cat((labels, test_labels))
    return _both(path, [*files, *test_files], labels, len(files), memory_gib, beside)


def _both(
    path: Path,
    files: Sequence[Path],
    labels: torch.Tensor,
    num_train: int,
    memory_gib: float,
    beside: Sequence[str],
) -> ImageData:
    """The first `num_train` files are the training images, the others the test images."""
    decoded = read_images(files, path, memory_gib)
    (images, kept), (test_images, test_kept) = decoded.split(num_train)
    _enough(path, kept, decoded.skipped)
    train_labels, test_labels = labels[:num_train][kept], labels[num_train:][test_kept]
    skipped = [*beside, *decoded.skipped]
    return _data(images, train_labels, test_images, test_labels, skipped)


def _left_out(path: Path) -> list[str]:
    """Images directly in a folder of classes, with one warning for all."""
    files = [p for p in _images_in(path) if p.parent == path]
    if files:
        warnings.warn(
            f"left out {len(files)} images in {path} that lie beside the class folders, such as "
            f"{files[0].name}",
            stacklevel=2,
        )
    return [f"{p.name} (beside the class folders)" for p in files]


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
        and (p.is_file() or p.is_symlink())  # a link to nowhere is named as broken
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )


def _enough(path: Path, found: Sequence[object], skipped: Sequence[str] = ()) -> None:
    if len(found) < 2:
        broken = f"; {len(skipped)} could not be read, such as {skipped[0]}" if skipped else ""
        raise ConfigError(
            "data_dir", path, f"at least two images, and there are {len(found)}{broken}"
        )
