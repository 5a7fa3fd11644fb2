"""Images by number: the same at any number of processes and after a stop, cut to size, and refused where broken."""

import io
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from core.errors import ConfigError, InvalidValue, UserError
from datamodules.images.digits import Digits
from datamodules.images.hf_images import HFImages
from datamodules.images.image_datamodule import ImageDataModule
from datamodules.images.image_folder import ImageFolder
from datamodules.images.samples import ImageSamples, cut_to_size, with_channels
from datamodules.images.shapes import CELL, CELLS, KINDS, MOST, Shapes, draw_scene
from datamodules.images.sources import ImageArrays, decode
from datamodules.index import CorpusError
from datamodules.stream import SampleStream


def arrays(number: int = 12, size: int = 6, channels: int = 1) -> ImageArrays:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (number, size, size, channels)).astype(np.uint8)
    return ImageArrays(images, np.arange(number) % 3)


def make_folder(root: Path) -> Path:
    """Two classes, of images whose brightness tells them apart: 6 and 4 to train on, 3 and 2 held out."""
    for split, numbers in (("train", (6, 4)), ("val", (3, 2))):
        for label, (name, number) in enumerate(zip(("dark", "light"), numbers, strict=True)):
            (root / split / name).mkdir(parents=True)
            for n in range(number):
                picture = np.full((8, 10, 3), 40 + 150 * label + n, np.uint8)
                Image.fromarray(picture).save(root / split / name / f"{n}.png")
    return root


def folder_data(path: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(**{"path": str(path), "batch_size": 2, "image_size": 4, **arguments})


def test_digits_are_scikit_learns_a_fifth_of_them_held_out() -> None:
    data, known = Digits(batch_size=60), load_digits()
    train, val = data.source("train"), data.source("val")
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    assert val.labels.tolist() == known.target[::5].tolist()
    assert np.abs(val.images[..., 0] / 255 * 16 - known.images[::5]).max() < 0.04
    rows = data.samples("train").read(np.arange(1437))
    assert rows["images"].shape == (1437, 1, 8, 8)
    assert abs(float(rows["images"].mean())) < 0.01
    assert abs(float(rows["images"].std()) - 1) < 0.01
    assert 0.95 < data.linear_accuracy() < 0.98
    assert data.unigram_loss() == pytest.approx(np.log(10), abs=0.05)
    pixels, labels = data._all
    for changed in ((np.roll(pixels, 1, 0), labels), (pixels, np.roll(labels, 1))):
        other = Digits(batch_size=60)
        vars(other)["_all"] = changed
        assert other.content != data.content


@pytest.mark.parametrize("source", ["digits", "shapes"])
def test_batches_are_the_same_at_any_number_of_ranks_and_after_a_stop(source: str) -> None:
    samples = (Digits(batch_size=4) if source == "digits" else Shapes(batch_size=4)).samples("train")
    whole = [SampleStream(samples, 4).read(n) for n in range(4)]
    for first in (0, 8):
        parts = [SampleStream(samples, 4, first_sample=first, rank=rank, world_size=2) for rank in (0, 1)]
        for number in range(2):
            rows = [part.read(number) for part in parts]
            for name, expected in whole[number + first // 4].items():
                assert np.array_equal(np.concatenate([row[name] for row in rows]), expected)


def test_every_image_comes_once_an_epoch_in_another_order() -> None:
    samples = ImageSamples(arrays(), 6, 1, [0.5], [0.5], seed=1)
    first, second = (samples.read(np.arange(n, n + 12))["images"] for n in (0, 12))
    assert not np.array_equal(first, second)
    assert sorted(first.sum((1, 2, 3)).tolist()) == sorted(second.sum((1, 2, 3)).tolist())


def test_augmentation_depends_on_the_samples_number_alone() -> None:
    def shifted(pixels: Any) -> Any:
        return np.roll(pixels, int(torch.randint(6, ())), axis=0)

    samples = ImageSamples(arrays(), 6, 1, [0.5], [0.5], 0, shifted)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = samples.read(np.arange(40))["images"]
    assert torch.equal(torch.get_rng_state(), before), "training draws what it would have drawn"
    torch.manual_seed(6)
    assert np.array_equal(samples.read(np.array([17, 3]))["images"], rows[[17, 3]])
    plain = ImageSamples(arrays(), 6, 1, [0.5], [0.5], 0).read(np.arange(40))["images"]
    same = (rows == plain).all((1, 2, 3))
    assert 0 < same.sum() < 20


def test_another_seed_augments_otherwise() -> None:
    def drawn(pixels: Any) -> Any:
        return np.full_like(pixels, int(torch.randint(256, ())))

    by_seed = [
        ImageSamples(arrays(), 6, 1, [0.5], [0.5], seed, drawn).read(np.arange(12))["images"][:, 0, 0, 0].tolist()
        for seed in (0, 0, 1)
    ]
    assert by_seed[0] == by_seed[1]
    assert sorted(by_seed[0]) != sorted(by_seed[2])


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    picture = np.tile(np.array([51, 102, 204], np.uint8), (1, 4, 4, 1))
    source = ImageArrays(picture, np.zeros(1, np.int64))
    rows = ImageSamples(source, 4, 3, [0.1, 0.2, 0.3], [0.2, 0.4, 0.8], 0).read(np.zeros(1, np.int64))
    np.testing.assert_allclose(
        rows["images"][0, :, 1, 2], [(0.2 - 0.1) / 0.2, (0.4 - 0.2) / 0.4, (0.8 - 0.3) / 0.8], 1e-5
    )


@pytest.mark.parametrize("extra", [1, 4, 5])
@pytest.mark.parametrize("across", [True, False])
def test_what_is_left_over_is_cut_off_on_both_sides_alike(extra: int, across: bool) -> None:
    """Rows or columns are numbered; of an odd number the one more is cut off behind."""
    numbered = np.arange(20 * (20 + extra), dtype=np.int64).reshape(20, -1) % (20 + extra)
    pixels = numbered.astype(np.uint8)[..., None]
    found = cut_to_size(pixels if across else pixels.swapaxes(0, 1), 20)[..., 0]
    expected = np.arange(extra // 2, extra // 2 + 20)
    assert ((found if across else found.T) == expected).all()


def test_images_are_cut_to_their_middle() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (cut_to_size(wide, 8) == 200).all()
    assert cut_to_size(wide, 4).shape == (4, 4, 3)
    assert (abs(cut_to_size(wide, 4)[:, 1:3].astype(int) - 200) < 10).all(), "bicubic, so not quite"
    assert cut_to_size(np.zeros((3, 5, 1), np.uint8), 7).shape == (7, 7, 1)


def test_channels_are_repeated_or_become_luma() -> None:
    assert with_channels(np.full((2, 2, 1), 9, np.uint8), 3).tolist() == [[[9, 9, 9]] * 2] * 2
    colours = np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.abs(with_channels(colours, 1)[..., 0].astype(int) - expected).max() <= 1


def test_a_folder_has_its_classes_by_name(tmp_path: Path) -> None:
    data = folder_data(make_folder(tmp_path / "images"))
    data.check()
    assert (data.classes, data.num_classes, data.num_val_samples) == (["dark", "light"], 2, 5)
    rows = data.samples("val").read(np.arange(5))
    assert rows["images"].shape == (5, 3, 4, 4)
    assert ((rows["images"].mean((1, 2, 3)) > 0) == rows["labels"]).all()


def test_other_files_make_another_collection(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = folder_data(root).stream_identity
    assert folder_data(root).stream_identity == before
    (root / "train/dark/0.png").rename(root / "train/dark/9.png")
    assert folder_data(root).stream_identity != before


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(CorpusError, match=r"train/.*\.png cannot be read as an image"):
        folder_data(root).check()


def test_of_sixteen_bits_the_upper_eight_are_read(tmp_path: Path) -> None:
    levels = np.linspace(0, 2**16 - 1, 64).round().astype(np.uint16).reshape(8, 8)
    for name, pixels in (("gray.png", levels), ("gray.tif", levels.astype(">u2"))):
        Image.fromarray(pixels).save(tmp_path / name)
        assert decode(tmp_path / name, name)[..., 0].tolist() == (levels >> 8).tolist(), name
    for name, kind in (("integers.tif", np.int32), ("fractions.tif", np.float32)):
        Image.fromarray(levels.astype(kind)).save(tmp_path / name)
        with pytest.raises(CorpusError, match=rf"{name} cannot be read as an image: pixels of 32 bits"):
            decode(tmp_path / name, name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int, tmp_path: Path) -> None:
    """As EXIF says where the first row and column of what is stored belong: one of the eight ways to lay a picture."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=tag)
    upright = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.T, stored.T[:, ::-1]]
    upright += [stored.T[::-1, ::-1], stored.T[::-1]]
    assert decode(tmp_path / "turned.png", "")[..., 0].tolist() == upright[orientation - 1].tolist()


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    colours = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    assert decode(tmp_path / "colours.png", "").tolist() == [[[10, 20, 30], [255, 255, 255]]]
    Image.fromarray(colours[..., [0, 3]]).save(tmp_path / "gray.png")
    assert decode(tmp_path / "gray.png", "").tolist() == [[[10], [255]]]
    for levels in (np.array([[7, 8, 200]], np.uint8), np.array([[0x0701, 0x0702, 0xC801]], np.uint16)):
        Image.fromarray(levels).save(tmp_path / "level.png", transparency=int(levels[0, 1]))
        assert decode(tmp_path / "level.png", "")[..., 0].tolist() == [[7, 255, 200]], levels.dtype
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.gif", transparency=1)
    assert decode(tmp_path / "palette.gif", "").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_an_image_that_is_a_line_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"an image of 1000000 x 1 pixels .* more than 100 times"):
        cut_to_size(np.zeros((1, 1_000_000, 1), np.uint8), 224)
    lines = ImageArrays(np.zeros((3, 1, 300, 1), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(CorpusError, match=r"^image [012]: an image of 300 x 1 pixels"):
        ImageSamples(lines, 8, 1, [0.5], [0.5], 0).read(np.arange(1))


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = folder_data(root).content
    os.rename(root / "train/dark/0.png", os.fsencode(root / "train/dark") + b"/\xff.png")
    data = folder_data(root)
    data.check()
    assert data.content != before
    assert data.samples("train").read(np.arange(10))["images"].shape == (10, 3, 4, 4)


def test_classes_of_held_out_images_are_those_of_training(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    shutil.rmtree(root / "val/dark")
    assert folder_data(root).source("val").labels.tolist() == [1, 1]


def test_what_is_no_image_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "images")
    for name in ("train/dark/notes.txt", "val/dark/b.TXT", "train/dark/README", "train/stray.png"):
        (root / name).write_bytes(b"")
    (root / "train/dark/more").symlink_to(root / "train/light")
    folder_data(root).check()
    said = capsys.readouterr().out
    assert said.startswith(f"Left out of {root}: 5 that are no images (")
    for kind in ("2 .txt", "1 without an ending", "1 outside of the classes' folders", "1 links to folders"):
        assert kind in said


def test_nothing_is_said_where_all_are_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_data(make_folder(tmp_path / "images")).check()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["train/dark/lost.png", "train/lost", "val/dark/deeper/lost"])
def test_links_that_lead_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to("/nowhere/at/all.png")
    with pytest.raises(ConfigError, match=rf"without links that lead nowhere: 1 do, as .*{name}"):
        folder_data(root).check()


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "train/.ipynb_checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"there are none in train/ of \.ipynb_checkpoints"):
        folder_data(root).check()


def test_the_order_of_held_out_images_does_not_depend_on_the_seed() -> None:
    one, other = (Digits(batch_size=4, seed=seed).samples("val").read(np.arange(360)) for seed in (1, 2))
    assert np.array_equal(one["images"], other["images"])


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"image_size": 6}, {"mean": [0.4]}, {"std": [0.4]}], ids=lambda other: next(iter(other))
)
def test_a_stream_of_other_pixels_is_another_stream(other: dict[str, Any]) -> None:
    same = {"batch_size": 4, "image_size": 8}
    assert Digits(**same).stream_identity == Digits(**same).stream_identity
    assert Digits(**{**same, **other}).stream_identity != Digits(**same).stream_identity


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(CorpusError, match="cannot be read as an image"):
        folder_data(root).check()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("train/light", r"data\.path=.* at least two folders of images"),
        ("val", r"data\.path=.* images in .*val/CLASS"),
        ("train", "at least two folders"),
    ],
)
def test_a_folder_without_what_is_needed_is_refused(remove: str, message: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    shutil.rmtree(root / remove)
    with pytest.raises(ConfigError, match=message):
        folder_data(root).check()


def test_what_does_not_fit_a_folder_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"data\.path='/nowhere' .* train/CLASS and val/CLASS"):
        folder_data(Path("/nowhere"))
    with pytest.raises(ConfigError, match=r"data\.batch_size=7 is not valid: expected at most 5: val images"):
        folder_data(root, batch_size=7).check()
    with pytest.raises(ConfigError, match=r"data\.mean=\[0.5\] .* each of 3 channels"):
        folder_data(root, mean=[0.5])
    with pytest.raises(ConfigError, match=r"data\.num_channels=2"):
        folder_data(root, num_channels=2)
    (root / "val/grey").mkdir()
    with pytest.raises(ConfigError, match="no other classes than train/: grey"):
        folder_data(root).check()


def test_augmentation_without_torchvision_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"data\.augmentation is torchvision's.*install the torchvision that goes with"):
        Digits(batch_size=4, augmentation={"RandomCrop": {"size": 8}})


class Shift(torch.nn.Module):
    """A transform as torchvision's are, for machines without it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 1, "[channels, height, width]"
        return image.roll(int(torch.randint(1, self.most + 1, ())), dims=1)


class Scale(torch.nn.Module):
    """Returns fractions, as torchvision's ToDtype can."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image / 255


class Fail(torch.nn.Module):
    """Does not take images so small, as torchvision's RandomCrop can."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise ValueError("Required crop size is larger than the image")


def test_transforms_are_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    v2: Any = types.ModuleType("torchvision.transforms.v2")
    v2.Shift, v2.Scale, v2.Fail, v2.functional = Shift, Scale, Fail, types.ModuleType("functional")
    transforms: Any = types.ModuleType("torchvision.transforms")
    transforms.v2 = v2
    for name, module in (("torchvision", types.ModuleType("torchvision")), ("torchvision.transforms", transforms)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", v2)

    def data(augmentation: dict[str, Any] | None) -> ImageDataModule:
        return Digits(batch_size=4, augmentation=augmentation)

    identities = [data(one).stream_identity for one in (None, {"Shift": {"most": 3}}, {"Shift": {"most": 2}})]
    assert all(identities.count(one) == 1 for one in identities)
    plain, shifted = (data(one).samples("train").read(np.arange(8)) for one in (None, {"Shift": {"most": 3}}))
    assert np.array_equal(plain["labels"], shifted["labels"])
    for before, after in zip(plain["images"], shifted["images"], strict=True):
        assert any(np.array_equal(np.roll(before, by, axis=1), after) for by in (1, 2, 3))
    of_val = [data(one).samples("val").read(np.arange(8))["images"] for one in (None, {"Shift": {"most": 3}})]
    assert np.array_equal(*of_val), "held-out images stay as they are"
    with pytest.raises(InvalidValue, match=r"data\.augmentation\.Fail=.* larger than the image"):
        data({"Fail": None}).check()
    with pytest.raises(ConfigError, match=r"data\.augmentation\.Scale=.* returns an image of 8 bits"):
        data({"Scale": None}).check()
    with pytest.raises(ConfigError, match=r"data\.augmentation\.functional=.* the name of a transform"):
        data({"functional": None})
    with pytest.raises(ConfigError, match=r"data\.augmentation\.Shift=.*unexpected keyword"):
        data({"Shift": {"least": 3}})


def test_a_dataset_of_hugging_face_is_read_from_a_folder(tmp_path: Path) -> None:
    import datasets

    pictures = arrays(8, channels=3)
    rows = {"img": [Image.fromarray(image) for image in pictures.images], "label": pictures.labels.tolist()}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=split, test=split.select(range(4))).save_to_disk(tmp_path / "saved")
    arguments: dict[str, Any] = {"path": str(tmp_path / "saved"), "num_classes": 3, "batch_size": 2, "image_size": 6}
    data = HFImages(**arguments)
    data.prepare_data()
    data.check()
    assert data.num_val_samples == 4
    expected = ImageSamples(pictures, 6, 3, [0.5] * 3, [0.5] * 3, 0).read(np.arange(8))
    found = data.samples("train").read(np.arange(8))
    for name, values in expected.items():
        assert np.array_equal(found[name], values)
    other = datasets.DatasetDict(train=split, test=split.select([1, 0, 2, 3]))
    other.save_to_disk(tmp_path / "other")
    assert HFImages(**{**arguments, "path": str(tmp_path / "other")}).content != data.content
    with pytest.raises(ConfigError, match=r"data\.image_column='image' .* one of img, label"):
        HFImages(**arguments, image_column="image").prepare_data()
    with pytest.raises(ConfigError, match=r"data\.path=.*split validation"):
        HFImages(**arguments, val_split="validation").prepare_data()
    with pytest.raises(ConfigError, match=r"data\.num_classes=2 .* more than 2"):
        HFImages(**{**arguments, "num_classes": 2}).check()
    with pytest.raises(ConfigError, match=r"data\.num_classes=4 .* 3: the dataset names so many"):
        HFImages(**{**arguments, "num_classes": 4}).check()
    assert data.classes == ["0", "1", "2"]
    named = datasets.ClassLabel(names=["plane", "car", "bird"])
    assert save_dataset(tmp_path / "named", [0, 1, 2], named).classes == ["plane", "car", "bird"]
    assert save_dataset(tmp_path / "numbers", [0, 1, 2], datasets.Value("int64")).classes is None


def save_dataset(folder: Path, labels: list[Any], kind: Any, image: Any = None) -> HFImages:
    import datasets

    picture = Image.fromarray(np.zeros((6, 6, 3), np.uint8)) if image is None else image
    kind = datasets.Value(kind) if isinstance(kind, str) else kind
    features = datasets.Features({"img": datasets.Image(), "label": kind})
    rows = {"img": [picture] * len(labels), "label": labels}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=split, test=split).save_to_disk(folder)
    return HFImages(str(folder), num_classes=3, batch_size=2, image_size=6)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [(["a", "b"], "string"), ([0.5, 1.5], "float32"), ([0, None], "int64"), ([True, False], "bool")],
    ids=lambda value: str(value),
)
def test_labels_that_are_no_numbers_of_classes_are_refused(labels: list[Any], kind: str, tmp_path: Path) -> None:
    import datasets

    data = save_dataset(tmp_path, labels, datasets.Value(kind))
    with pytest.raises(ConfigError, match=r"data\.label_column='label' .* the number of each image's class: train has"):
        data.check()


def test_images_without_a_class_are_refused(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(CorpusError, match="train images have -1 for a class"):
        save_dataset(tmp_path, [-1, 0], datasets.Value("int64")).check()


def test_a_damaged_image_of_a_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    damaged = {"bytes": b"no image", "path": None}
    with pytest.raises(CorpusError, match=r"image [01] of the dataset cannot be read as an image"):
        save_dataset(tmp_path / "damaged", [0, 1], datasets.Value("int64"), damaged).check()
    large = save_dataset(tmp_path / "large", [0, 1], datasets.Value("int64"))
    for most in (20, 10):  # of 36: PIL warns, and above twice as many it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(CorpusError, match=r"image [01] of the dataset cannot be read as an image.*decompression"):
            large.check()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def other_formats() -> dict[str, bytes]:
    """Files of formats that PIL reads, and nobody trains on."""
    found = {"EPS": EPS}
    for kind in ("ICO", "TGA", "PCX", "SGI"):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI"])
def test_no_other_format_is_read_whatever_a_file_is_called(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL starts a program for an EPS."""
    started: list[Any] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **_: started.append(arguments))
    content = other_formats()[kind]
    (tmp_path / "cat.png").write_bytes(content)
    for file in (tmp_path / "cat.png", io.BytesIO(content)):
        with pytest.raises(CorpusError, match=r"cat\.png cannot be read as an image: its content is none of BMP, GIF"):
            decode(file, "cat.png")
    row = {"bytes": content, "path": "cat.png"}
    with pytest.raises(CorpusError, match=r"image [01] of the dataset .* its content is none of BMP, GIF"):
        save_dataset(tmp_path / "saved", [0, 1], "int64", row).check()
    assert not started


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_usual_formats_are_read(kind: str, tmp_path: Path) -> None:
    """MPO is what telephones write as jpg."""
    more = {"save_all": True, "append_images": [Image.new("RGB", (6, 6))]} if kind == "MPO" else {}
    Image.new("RGB", (6, 6), "red").save(tmp_path / "x", kind, **more)
    content = (tmp_path / "x").read_bytes()
    assert decode(tmp_path / "x", "x").shape == (6, 6, 3)
    data = save_dataset(tmp_path / "saved", [0, 1], "int64", {"bytes": content, "path": None})
    assert np.array_equal(data.source("train").image(0), decode(tmp_path / "x", "x"))


def names_in_place_of_bytes(folder: Path, name: str, column: str) -> HFImages:
    """A dataset of save_to_disk, in whose rows a name stands in the place of an image."""
    import datasets
    import pyarrow as pa

    picture = Image.fromarray(np.zeros((6, 6, 3), np.uint8))
    save_dataset(folder, [0, 1], "int64", picture)
    for split in ("train", "test"):
        named = pa.array([{"bytes": None, "path": name}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"img": named, "label": pa.array([0, 1]) if column == "img" else named})
        (file,) = (folder / split).glob("*.arrow")
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        if column == "label":
            info = folder / split / "dataset_info.json"
            content = json.loads(info.read_text())
            content["features"]["label"] = datasets.Features({"x": datasets.Image()}).to_dict()["x"]
            info.write_text(json.dumps(content))
    return HFImages(str(folder), num_classes=3, batch_size=2, image_size=6)


@pytest.mark.parametrize("column", ["img", "label"])
@pytest.mark.parametrize("kind", ["a file", "an address"])
def test_what_a_dataset_names_in_the_place_of_an_image_is_not_opened(
    column: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (6, 6)).save(tmp_path / "secret.png")
    name = str(tmp_path / "secret.png") if kind == "a file" else "http://localhost:9/spy.png"
    data = names_in_place_of_bytes(tmp_path / "saved", name, column)
    opened: list[str] = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: opened.append(file) or open_image(file, *a, **k))
    monkeypatch.setattr("datasets.features.image.xopen", lambda *arguments, **_: opened.append(arguments))
    if column == "label":
        with pytest.raises(ConfigError, match=r"data\.label_column='label' .* train has Image"):
            data.check()
    else:
        with pytest.raises(CorpusError, match=r"image 0 of the dataset names '.*', where the bytes of an image are"):
            data.source("train").image(0)
    assert not opened


def test_a_column_that_is_not_of_images_is_refused(tmp_path: Path) -> None:
    data = save_dataset(tmp_path, [0, 1], "int64")
    data.image_column = "label"
    with pytest.raises(ConfigError, match=r"data\.image_column='label' .* datasets\.Image: train has Value"):
        data.check()


def test_the_mode_of_a_datasets_images_is_kept(tmp_path: Path) -> None:
    import datasets

    picture = Image.fromarray(np.arange(108).astype(np.uint8).reshape(6, 6, 3))
    features = datasets.Features({"img": datasets.Image(mode="L"), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"img": [picture] * 2, "label": [0, 1]}, features=features)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "gray")
    data = HFImages(
        str(tmp_path / "gray"), num_classes=2, batch_size=2, image_size=6, num_channels=1, mean=[0], std=[1]
    )
    assert np.array_equal(data.source("train").image(1)[..., 0], np.asarray(picture.convert("L")))


def test_a_scene_has_as_many_shapes_like_the_framed_one_as_it_says() -> None:
    """Told by the pixels that shine: a shape is one of its kind's drawing, turned and moved, and nothing else."""
    drawings = {
        kind: {
            np.pad(np.rot90(shape, turn), ((top, CELL - top - len(shape)), (left, CELL - left - len(shape)))).tobytes()
            for turn in range(4)
            for top in range(1, CELL - len(shape))
            for left in range(1, CELL - len(shape))
        }
        for kind, shape in ((kind, np.array([[mark == "#" for mark in row] for row in KINDS[kind]])) for kind in KINDS)
    }
    assert sum(map(len, drawings.values())) == len(set.union(*drawings.values())), "each is of one kind"
    assert {sum(map(bool, drawing)) for drawings_of in drawings.values() for drawing in drawings_of} == {9}
    labels = []
    for number in range(60):
        scene, label = draw_scene(np.random.default_rng([7, number]), clutter=0)
        cells = scene.reshape(CELLS, CELL, CELLS, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL) > 0.25
        framed = cells[:, 0].all(1)
        cells[:, [0, -1]] = cells[:, :, [0, -1]] = False
        kinds = [next((kind for kind in KINDS if cell.tobytes() in drawings[kind]), None) for cell in cells]
        assert len([kind for kind in kinds if kind]) == 8
        ((place,),) = np.nonzero(framed)
        assert kinds.count(kinds[place]) - 1 == label
        labels.append(label)
    assert {*labels} == {0, 1, 2, 3}


def test_brightness_says_nothing_of_a_scenes_class() -> None:
    """Neither the mean, nor the histogram of all pixels, nor pixels by themselves: forests and lines are at chance."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import RidgeClassifier

    rows = Shapes(batch_size=8).samples("train").read(np.arange(2000))
    images, labels = rows["images"], rows["labels"]
    histograms = np.stack([np.histogram(image, 16, (images.min(), images.max()))[0] for image in images])
    brightness = np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], axis=1)
    forest = RandomForestClassifier(15, min_samples_leaf=5, random_state=0)
    for model, inputs in (
        (forest, brightness),
        (forest, histograms),
        (RidgeClassifier(100.0), images.reshape(len(images), -1)),
    ):
        found = model.fit(inputs[:1000], labels[:1000]).predict(inputs[1000:])
        assert abs(float((found == labels[1000:]).mean()) - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5


def test_scenes_are_of_all_classes_and_differ_by_seed_and_split() -> None:
    data = Shapes(batch_size=8, seed=1)
    rows = data.samples("train").read(np.arange(200))
    assert rows["images"].shape == (200, 1, 24, 24)
    assert rows["images"].dtype == np.float32
    counts = np.bincount(rows["labels"], minlength=MOST + 1)
    assert counts.min() > 15
    assert abs(float(rows["images"].mean())) < 0.05
    assert abs(float(rows["images"].std()) - 1) < 0.05
    others = [Shapes(batch_size=8, seed=2).samples("train"), data.samples("val")]
    assert Shapes(batch_size=8, clutter=2).stream_identity != Shapes(batch_size=8).stream_identity
    assert not any(np.array_equal(other.read(np.arange(2))["images"], rows["images"][:2]) for other in others)
    assert np.array_equal(
        Shapes(8, seed=3).samples("val").read(np.arange(2))["images"], others[1].read(np.arange(2))["images"]
    )
