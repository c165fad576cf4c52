"""CIFAR-10, CIFAR-100 and Tiny ImageNet as their authors hand them out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .config import ConfigError
from .data import ImageData
from .decode import read_images
from .folder import MEAN, STD

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TINY = "tiny-imagenet-200"
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def cifar(name: str, root: Path, *, download: bool = False) -> ImageData:
    """`cifar10` or `cifar100`: 50,000 and 10,000 images (N, 3, 32, 32), read by torchvision.

    Mean and standard deviation are those of CIFAR-10 for both, as in the published code of CLAE.

    Args:
        name: "cifar10" or "cifar100".
        root: the folder that holds cifar-10-batches-py or cifar-100-python.
        download: fetch the archive if it is not there.

    Raises:
        ConfigError: missing, damaged, or the download failed.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    where = root / kind.base_folder
    if download:
        with _fetching(kind.url, where):  # only what is not there or damaged
            kind(str(root), download=True)
    if not where.is_dir():
        raise _missing(where, kind.url)
    try:
        train, test = kind(str(root), train=True), kind(str(root), train=False)
    except RuntimeError as error:  # torchvision compares every file with its md5
        raise ConfigError(
            "data_dir", where, f"the files of {kind.url}; these are incomplete or damaged"
        ) from error
    images, test_images = (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    )
    return ImageData(
        name,
        images,
        torch.tensor(train.targets, dtype=torch.int64),
        test_images,
        torch.tensor(test.targets, dtype=torch.int64),
        CIFAR_MEAN,
        CIFAR_STD,
    )


def tiny_imagenet(root: Path, memory_gib: float = 4.0, *, download: bool = False) -> ImageData:
    """`tiny-imagenet`: 100,000 images of 64 x 64 in 200 classes; the 10,000 of val are the test.

    A label is the place of the class in wnids.txt. Mean and standard deviation are ImageNet's.

    Args:
        root: the folder that holds tiny-imagenet-200.
        memory_gib: keep the decoded images in memory up to this size (the whole set takes 1.3).
        download: fetch the archive if it is not there.

    Raises:
        ConfigError: missing, incomplete, or the download failed.
    """
    where = root / TINY
    if download and not where.is_dir():
        _download_tiny(root, where)
    names, annotations = where / "wnids.txt", where / "val" / "val_annotations.txt"
    if not where.is_dir():
        raise _missing(where, TINY_URL)
    for file in (names, annotations):
        if not file.is_file():
            raise ConfigError("data_dir", file, f"a file of {TINY_URL}; the set is incomplete")
    wnids = names.read_text().split()
    files: list[Path] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        own = sorted((where / "train" / wnid / "images").glob("*.JPEG"))
        if not own:
            raise ConfigError(
                "data_dir", where / "train" / wnid / "images", "its images; the set is incomplete"
            )
        files += own
        labels += [label] * len(own)
    test_files: list[Path] = []
    test_labels: list[int] = []
    for line in filter(str.strip, annotations.read_text().splitlines()):
        file_name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in wnids:
            raise ConfigError(
                "data_dir", annotations, f"lines of a file, a tab and a class, got {line!r}"
            )
        test_files.append(where / "val" / "images" / file_name)
        test_labels.append(wnids.index(wnid))
    both = read_images([*files, *test_files], where, memory_gib)  # one budget for both
    (images, kept), (test_images, test_kept) = both.split(len(files))
    skipped = both.skipped
    return ImageData(
        "tiny-imagenet",
        images,
        torch.tensor(labels, dtype=torch.int64)[kept],
        test_images,
        torch.tensor(test_labels, dtype=torch.int64)[test_kept],
        MEAN,
        STD,
        tuple(skipped),
        size=64,  # also where they are not in memory
    )


def _download_tiny(root: Path, where: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    with _fetching(TINY_URL, where):
        # Beside its place and renamed when whole: a break leaves nothing that looks like the set.
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".tiny-imagenet-"))
        try:
            download_and_extract_archive(TINY_URL, str(temporary), remove_finished=True)
            os.rename(temporary / TINY, where)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _fetching(url: str, where: Path) -> Iterator[None]:
    """The parent folder of `where` exists; what fails is one error, and leaves no empty folder."""
    missing = [p for p in (where.parent, *where.parent.parents) if not p.exists()]
    where.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            "download",
            True,
            f"{url} to be reachable ({error}); or unpack it by hand in {where.parent}",
        ) from error
    finally:
        for path in missing:  # the deepest first
            if not any(path.iterdir()):
                path.rmdir()


def _missing(where: Path, url: str) -> ConfigError:
    if where.parent.name == where.name:
        return ConfigError("data_dir", where.parent, f"the folder above it, {where.parent.parent}")
    return ConfigError(
        "data_dir",
        where.parent,
        f"a folder that holds {where.name}: there is no {where}. --download fetches it, or unpack "
        f"{url} there",
    )
