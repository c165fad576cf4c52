"""Data sets: readers on small files in the real formats, and what is said when they are wrong."""

import hashlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from clae_fast.pretraining import ConfigError, load_data
from clae_fast.pretraining import archives as archives_module
from clae_fast.pretraining.config import DATA
from clae_fast.pretraining.data import every_fifth
from clae_fast.pretraining.decode import NAMED, ImageFiles, decode, read_images

RNG = np.random.default_rng(0)


def image(height=6, width=5, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def as_tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)


# --- CIFAR ---


def write_cifar(root, monkeypatch, name):
    """Batches as in the archives, and their md5 where torchvision looks them up."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    batches = {}
    for file, _ in (*kind.train_list, *kind.test_list):
        pixels = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = RNG.integers(0, 10, 4).tolist()
        batches[file] = (pixels, labels)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels}, protocol=2))
    names = {kind.meta["key"]: [f"class {i}" for i in range(100)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names, protocol=2))

    def md5(file):
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        files = [[file, md5(file)] for file, _ in getattr(kind, part)]
        monkeypatch.setattr(kind, part, files)
    meta = kind.meta | {"md5": md5(kind.meta["filename"])}
    monkeypatch.setattr(kind, "meta", meta)
    return kind, folder, batches


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_it_lies_in_the_archive(name, tmp_path, monkeypatch):
    kind, _, batches = write_cifar(tmp_path, monkeypatch, name)
    data = load_data(name, tmp_path)
    train = [batches[file] for file, _ in kind.train_list]
    pixels = np.concatenate([p for p, _ in train]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.train_images, torch.from_numpy(pixels))
    assert data.train_labels.tolist() == sum((labels for _, labels in train), [])
    test_pixels, test_labels = batches[kind.test_list[0][0]]
    assert torch.equal(data.test_images, torch.from_numpy(test_pixels.reshape(-1, 3, 32, 32)))
    assert data.test_labels.tolist() == test_labels
    assert data.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_missing_data_names_the_path_and_the_way_to_get_it(name, tmp_path):
    folder, url = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
        "tiny-imagenet": ("tiny-imagenet-200", "tiny-imagenet-200.zip"),
    }[name]
    with pytest.raises(ConfigError) as caught:
        load_data(name, tmp_path / "wrong")
    message = str(caught.value)
    assert caught.value.field == "data_dir"
    for words in (str(tmp_path / "wrong" / folder), url, "--download"):
        assert words in message


def test_damaged_cifar_is_not_called_missing(tmp_path, monkeypatch):
    _, folder, _ = write_cifar(tmp_path, monkeypatch, "cifar10")
    with open(folder / "data_batch_3", "ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="these are incomplete or damaged"):
        load_data("cifar10", tmp_path)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    from torchvision.datasets import cifar as torchvision_cifar
    from torchvision.datasets import utils

    monkeypatch.setattr(torchvision_cifar, "download_and_extract_archive", refuse)
    monkeypatch.setattr(utils, "download_and_extract_archive", refuse)
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        with pytest.raises(ConfigError, match="download=True: .*no route to host") as caught:
            load_data(name, tmp_path / "d", download=True)
        assert caught.value.field == "download"
    assert not (tmp_path / "d").exists()


def test_download_is_not_tried_when_the_data_is_there(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    from torchvision.datasets import cifar as torchvision_cifar

    monkeypatch.setattr(
        torchvision_cifar,
        "download_and_extract_archive",
        lambda *a, **k: pytest.fail("downloaded"),
    )
    assert len(load_data("cifar10", tmp_path, download=True).train_images) == 20


# --- Tiny ImageNet ---

WNIDS = ("n02124075", "n04067472", "n01443537")


def write_tiny(root):
    folder = root / "tiny-imagenet-200"
    train, test = {}, []
    for wnid in WNIDS:
        for i in range(3):
            array = image(64, 64, 1 if i == 2 else 3)  # the real set has grey images too
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            train[wnid, i] = save(path, array, quality=95)
    lines = []
    for i, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[2], WNIDS[1])):
        path = save(folder / "val" / "images" / f"val_{i}.JPEG", image(64, 64))
        test.append((path, wnid))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t1\t62\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    return folder, train, test


def pil_pixels(path):
    return as_tensor(np.array(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("memory_gib", [4, 0])
def test_tiny_imagenet(memory_gib, tmp_path):
    _, train, test = write_tiny(tmp_path)
    data = load_data("tiny-imagenet", tmp_path, memory_gib=memory_gib)
    assert isinstance(data.train_images, torch.Tensor) is bool(memory_gib)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i, key in enumerate((w, n) for w in WNIDS for n in range(3)):
        assert torch.equal(data.train_images[i], pil_pixels(train[key])), key
    assert data.test_labels.tolist() == [WNIDS.index(wnid) for _, wnid in test]
    for i, (path, _) in enumerate(test):
        assert torch.equal(data.test_images[i], pil_pixels(path))


def test_incomplete_tiny_imagenet_is_named(tmp_path):
    folder, _, _ = write_tiny(tmp_path)
    (folder / "wnids.txt").rename(folder / "x.txt")
    with pytest.raises(ConfigError, match=r"wnids\.txt.*the set is incomplete"):
        load_data("tiny-imagenet", tmp_path)
    (folder / "x.txt").rename(folder / "wnids.txt")
    for path in (folder / "train" / WNIDS[1] / "images").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=f"{WNIDS[1]}.*the set is incomplete"):
        load_data("tiny-imagenet", tmp_path)


def test_an_interrupted_extraction_is_not_taken_for_the_set(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def half(url, root, remove_finished):
        (tmp_path / "d").joinpath(root, "tiny-imagenet-200", "train").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "download_and_extract_archive", half)
    with pytest.raises(KeyboardInterrupt):
        load_data("tiny-imagenet", tmp_path / "d", download=True)
    assert not (tmp_path / "d").exists()

    def whole(url, root, remove_finished):
        assert url == archives_module.TINY_URL
        write_tiny(tmp_path / "d" / root)

    monkeypatch.setattr(utils, "download_and_extract_archive", whole)
    assert len(load_data("tiny-imagenet", tmp_path / "d", download=True).train_images) == 9
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["tiny-imagenet-200"]


# --- any folder ---


def test_folder_of_classes(tmp_path):
    arrays = {}
    for name, count in (("cat", 7), ("dog", 11)):
        for i in range(count):
            arrays[name, i] = image(8 + i, 9)
            suffix = ("png", "PNG", "bmp")[i % 3]
            below = "deep/er/" if i % 2 else ""
            save(tmp_path / name / f"{below}{i:02d}.{suffix}", arrays[name, i])
    save(tmp_path / ".hidden" / "x.png", image())
    save(tmp_path / "cat" / ".hidden.png", image())
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_data("folder", tmp_path)
    labels = torch.tensor([0] * 7 + [1] * 11)
    test = every_fifth(labels)
    assert data.train_labels.tolist() == labels[~test].tolist()
    assert data.test_labels.tolist() == [0, 1, 1]
    assert (len(data.train_images), len(data.test_images)) == (15, 3)
    order = []
    for name in ("cat", "dog"):
        paths = sorted(p for p in (tmp_path / name).rglob("*") if p.suffix.lower() in
                       (".png", ".bmp") and not p.name.startswith("."))  # fmt: skip
        order += [(name, int(path.stem)) for path in paths]
    for i, key in enumerate(order):
        images = data.test_images if test[i] else data.train_images
        place = int(test[:i].sum() if test[i] else (~test[:i]).sum())
        assert torch.equal(images[place], as_tensor(arrays[key])), key
    assert data.skipped == ()


def test_folder_with_its_own_split(tmp_path):
    for part, names in (("train", "ab"), ("val", "b")):
        for name in names:
            for i in range(2):
                save(tmp_path / part / name / f"{i}.png", image(8, 8))
    data = load_data("folder", tmp_path)
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.test_labels.tolist() == [1, 1]
    assert data.train_images.shape == (4, 3, 8, 8)
    save(tmp_path / "val" / "c" / "0.png", image())
    with pytest.raises(ConfigError, match="the classes of train, and it also has c"):
        load_data("folder", tmp_path)


def test_flat_folder_has_no_labels(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", image(8, 8))
    data = load_data("folder", tmp_path)
    assert data.train_labels is None
    assert data.test_labels is None
    assert (len(data.train_images), len(data.test_images)) == (6, 0)


def test_broken_images_are_skipped_by_name(tmp_path):
    good = [image(8, 8) for _ in range(6)]
    for i, array in enumerate(good):
        save(tmp_path / "a" / f"{i}.png", array)
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("hello")
    with pytest.warns(UserWarning, match="skipped a broken image") as caught:
        data = load_data("folder", tmp_path)
    names = {name.split(" (")[0] for name in data.skipped}
    assert names == {"a/truncated.png", "a/empty.jpg", "a/text.png"}
    messages = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert len(messages) == 3
    assert all(any(name in message for message in messages) for name in names)
    assert len(data.train_images) + len(data.test_images) == 6
    assert torch.equal(data.train_images[3], as_tensor(good[3]))


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", image(8, 8))
    save(tmp_path / "bomb.png", image(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match=r"bomb\.png"):
        data = load_data("folder", tmp_path)
    assert len(data.train_images) == 3


def test_many_broken_images_are_counted(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", image(8, 8))
    for i in range(NAMED + 5):
        (tmp_path / f"x{i}.png").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_data("folder", tmp_path)
    messages = [str(w.message) for w in caught]
    assert len(messages) == NAMED + 1
    assert messages[0] == "skipped a broken image: x0.png (no image that can be read)"
    assert messages[-1] == "skipped 5 more broken images"


def test_nothing_to_train_on_is_named(tmp_path):
    def message(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ConfigError) as caught:
                load_data("folder", path)
        assert caught.value.field == "data_dir"
        return str(caught.value)

    assert "it does not exist" in message(tmp_path / "wrong")
    (tmp_path / "file").write_text("")
    assert "it is a file" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "at least two images, and there are 0" in message(tmp_path / "empty")
    save(tmp_path / "one" / "a.png", image())
    assert "at least two images, and there are 1" in message(tmp_path / "one")
    (tmp_path / "one" / "b.png").write_bytes(b"")
    assert "1 could not be read, such as b.png" in message(tmp_path / "one")
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "split" / "test").mkdir()
    assert "a sub-folder with images for each class" in message(tmp_path / "split")


@pytest.mark.parametrize("memory_gib", [1, 0])
def test_memory_limit_changes_no_pixel(memory_gib, tmp_path):
    arrays = [image(6 + i, 7) for i in range(5)]
    paths = [save(tmp_path / f"{i}.png", array) for i, array in enumerate(arrays)]
    images, kept, skipped = read_images(paths, tmp_path, memory_gib)
    assert isinstance(images, ImageFiles) is not bool(memory_gib)
    assert (kept, skipped) == ([0, 1, 2, 3, 4], [])
    for back in (images, pickle.loads(pickle.dumps(images)), images[:5]):
        assert len(back) == 5
        assert all(torch.equal(x, as_tensor(a)) for x, a in zip(back, arrays, strict=True))


# --- one image ---


def test_modes_become_rgb(tmp_path):
    grey = image(4, 5, 1)
    expected = torch.from_numpy(grey).expand(3, -1, -1)
    assert torch.equal(decode(save(tmp_path / "g.png", grey)), expected)

    deep = grey.astype(np.uint16) * 257  # 16 bits: 255 is 65535
    assert torch.equal(decode(save(tmp_path / "d.png", deep)), expected)

    colours = image()
    palette = Image.fromarray(colours).quantize(256)
    palette.save(tmp_path / "p.png")
    assert torch.equal(decode(tmp_path / "p.png"), as_tensor(np.array(palette.convert("RGB"))))

    cmyk = Image.fromarray(image(16, 16)).convert("CMYK")
    cmyk.save(tmp_path / "c.tif")
    assert torch.equal(decode(tmp_path / "c.tif"), as_tensor(np.array(cmyk.convert("RGB"))))

    clear = np.dstack((colours, np.zeros(colours.shape[:2], np.uint8)))
    clear[0, :, 3] = 255
    pixels = decode(save(tmp_path / "t.png", clear))
    assert torch.equal(pixels[:, 0], as_tensor(colours)[:, 0])
    assert (pixels[:, 1:] == 255).all()  # transparent: white


def test_orientation_is_honoured(tmp_path):
    array = image(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(array).save(tmp_path / "o.png", exif=exif)
    assert torch.equal(decode(tmp_path / "o.png"), as_tensor(np.rot90(array, -1).copy()))


# --- digits, names ---


def test_digits_of_scikit_learn():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = load_data("digits")
    assert len(data.train_images) + len(data.test_images) == len(labels) == 1797
    test = every_fifth(torch.from_numpy(labels).long())
    assert data.test_labels.tolist() == labels[test.numpy()].tolist()
    assert data.train_images.shape[1:] == (1, 28, 28)
    # Averaged back to 8 x 8 they are the digits again.
    small = torch.nn.functional.adaptive_avg_pool2d(data.train_images.double(), 8).flatten(1)
    original = torch.from_numpy(pixels)[~test] * (255 / 16)
    correlation = torch.corrcoef(torch.stack((small.flatten(), original.flatten())))[0, 1]
    assert correlation > 0.96
    scaled = (data.train_images.double() / 255 - data.mean[0]) / data.std[0]
    assert abs(scaled.mean()) < 1e-9
    assert abs(scaled.std() - 1) < 1e-9


def test_names():
    with pytest.raises(ConfigError) as caught:
        load_data("imagenet")
    for name in DATA:
        assert name in str(caught.value)
