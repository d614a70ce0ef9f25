"""Reading pictures of every kind, one size, augmentation, normalisation; and what is told of files that are no good."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import ScionError
from domains.vision import images
from domains.vision.folder import ImageFolder
from domains.vision.images import Pictures, View, from_pixels, pixels, read_picture
from tests.domains.vision.conftest import noise, write_picture

# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "jpg", "gif"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    file = write_picture(tmp_path / f"a.{suffix}", **options)
    found = read_picture(file)
    assert found.shape == (3, 30, 40) and found.dtype == torch.uint8
    error = (found.float() - pixels(noise()).float()).abs()
    assert error.max() == 0 if suffix not in ("jpg", "gif") else error.mean() < 12
    assert file in ImageFolder(source="mini").files(tmp_path)


def test_grey_palette_and_print_colours(tmp_path: Path) -> None:
    grey = read_picture(write_picture(tmp_path / "grey.png", mode="L"))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], pixels(noise().convert("L").convert("RGB"))[0])
    one_bit = read_picture(write_picture(tmp_path / "one.png", mode="1"))
    assert set(one_bit.unique().tolist()) == {0, 255}
    palette = read_picture(write_picture(tmp_path / "palette.png", mode="P"))
    assert torch.equal(palette, pixels(noise().convert("P").convert("RGB")))
    printed = read_picture(write_picture(tmp_path / "cmyk.jpg", mode="CMYK", quality=95))
    assert printed.shape == (3, 30, 40) and (printed.float() - pixels(noise()).float()).abs().mean() < 12


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_grey_of_16_bits_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 128, 129], [256 * 100, 257 * 100, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert read_picture(tmp_path / f"a.{suffix}").tolist() == [[[0, 1, 0, 1], [100, 100, 254, 255]]] * 3


def test_values_that_are_no_grey_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "wide.tiff")
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "half.tiff")
    for name in ("wide", "half"):
        with pytest.raises(ScionError, match=f"{name}.tiff: grey values beyond 16 bits"):
            read_picture(tmp_path / f"{name}.tiff")


def test_transparent_parts_lie_over_white(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), dtype=np.uint8)
    values[0, 0] = 10, 20, 30, 255
    values[0, 1] = 0, 0, 0, 51
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png")
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 0, 1].tolist() == [204] * 3
    assert found[:, 1].eq(255).all()
    Image.fromarray(values).convert("LA").save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png")[:, 1].eq(255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_picture(tmp_path / "palette.png")[:, 0].T.tolist() == [[255] * 3, [200, 100, 50]]


def test_the_first_frame_is_taken_and_no_orientation_applied(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    noise().save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").shape == (3, 30, 40)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "short", "folder", "broken", "bomb", "warned"])
def test_bad_files_are_named_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         recwarn: pytest.WarningsRecorder) -> None:
    file = tmp_path / "a.png"
    words = {"missing": "cannot be read", "empty": "0 bytes", "text": "no readable picture", "short": "cut short",
             "folder": "a folder", "broken": "damaged|no readable", "bomb": "bomb", "warned": "bomb"}[kind]
    if kind == "empty":
        file.touch()
    elif kind == "text":
        file.write_text("no picture at all")
    elif kind == "short":
        file = write_picture(tmp_path / "a.jpg", 300, 200)
        file.write_bytes(file.read_bytes()[:-1500])
    elif kind == "folder":
        file.mkdir()
    elif kind == "broken":
        content = bytearray(write_picture(file).read_bytes())
        content[60:200] = bytes(140)
        file.write_bytes(content)
    elif kind in ("bomb", "warned"):
        write_picture(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 if kind == "bomb" else 1000)
    with pytest.raises(ScionError, match=words) as caught:
        read_picture(file)
    assert str(caught.value).count(str(file)) == 1  # said once
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm"])
def test_every_format_that_is_cut_short_is_told(suffix: str, tmp_path: Path) -> None:
    file = write_picture(tmp_path / f"a.{suffix}", 64, 64)
    whole = file.read_bytes()
    for share in (0.3, 0.6, 0.9):
        file.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ScionError, match="cut short|no readable|cannot be read"):
            read_picture(file)


def test_files_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.JPG", "b/c.Png", "notes.txt", ".hidden.png", ".d/e.png", "__x.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in ImageFolder(source="mini").files(tmp_path)] == ["a.JPG", "c.Png"]


# ------------------------------------------------------------------------------------------------- one size


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(500, 375), (31, 77), (224, 224), (100, 399), (7, 5)])
def test_sizes_equal_torchvisions(interpolation: Any, size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    picture = noise(*size)
    squash = transforms.Resize((224, 224), mode)
    assert torch.equal(pixels(View(224, "squash", interpolation).scaled(picture)), pixels(squash(picture)))
    for side in (224, 48):
        crop = transforms.Compose([transforms.Resize(int(side * 256 / 224), mode), transforms.CenterCrop(side)])
        assert torch.equal(pixels(View(side, "crop", interpolation).scaled(picture)), pixels(crop(picture)))


@pytest.mark.parametrize("size", [(30, 180), (500, 60)])
def test_of_a_strip_the_middle_is_cropped_first(size: tuple[int, int]) -> None:
    """The official order, within rounding."""
    transforms = pytest.importorskip("torchvision.transforms")
    picture = noise(*size)
    official = transforms.Compose([transforms.Resize(54, transforms.InterpolationMode.BICUBIC),
                                   transforms.CenterCrop(48)])
    ours, theirs = pixels(View(48, "crop").scaled(picture)).float(), pixels(official(picture)).float()
    assert (ours - theirs).abs().max() <= 3 and theirs.std() > 10


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_a_thread_of_a_picture_costs_little(resize: Any) -> None:
    largest = 0
    original = Image.Image.resize

    def watched(self: Image.Image, size: Any, *rest: Any, **options: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return original(self, size, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        for size in ((1, 5000), (5000, 1)):
            view = View(224, resize)
            assert pixels(view.scaled(noise(*size))).shape == (3, 224, 224)
            assert pixels(view.scaled_part(noise(*size), torch.Generator().manual_seed(0))).shape == (3, 224, 224)
    assert 0 < largest <= 256 * 1024 or largest == 5000


def test_normalising_is_undone_by_shown() -> None:
    values = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for name, (mean, std) in images.STATISTICS.items():
        view = View(8, normalise=name)  # type: ignore[arg-type]
        inputs = view.normalised(values)
        torch.testing.assert_close(inputs[:, 1], (values[:, 1] / 255 - mean[1]) / std[1])
        assert inputs.dtype == torch.float32 and torch.equal(view.shown(inputs), values)
    assert View(8, normalise="none").shown(torch.full((3, 1, 1), 7.0)).tolist() == [[[255]]] * 3


# ------------------------------------------------------------------------------------------------- a set


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    values = torch.stack([pixels(noise(48, 48, seed)) for seed in range(12)])

    def epoch(number: int, augment: Any = "crop_flip", seed: int = 1) -> torch.Tensor:
        torch.rand(1)  # the global state has no say
        made = Pictures(values, list(range(12)), View(32), augment, seed)
        made.set_epoch(number)
        return torch.stack([made[index][0] for index in range(12)])

    for augment in ("flip", "crop_flip"):
        assert torch.equal(epoch(3, augment), epoch(3, augment))
        assert not torch.equal(epoch(3, augment), epoch(4, augment))
        assert not torch.equal(epoch(3, augment), epoch(3, augment, seed=2))
    plain, flipped = epoch(0, "none"), epoch(0, "flip")
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(plain, flipped, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True)) and 2 <= sum(turned) <= 10


def test_random_parts_have_the_published_areas_and_proportions() -> None:
    picture = Image.new("RGB", (200, 100))
    sizes = []

    def crop(self: Image.Image, box: Any) -> Image.Image:
        left, top, right, bottom = box
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        sizes.append((right - left, bottom - top))
        return Image.new("RGB", (4, 4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "crop", crop)
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            View(8).scaled_part(picture, generator)
    areas = np.array([width * height / 20_000 for width, height in sizes])
    proportions = np.array([width / height for width, height in sizes])
    assert 0.07 < areas.min() < 0.12 and areas.max() > 0.55  # the whole of it is wider than 4:3
    assert 0.7 < proportions.min() < 0.78 and 1.28 < proportions.max() < 1.4
    assert abs(np.log(proportions).mean()) < 0.05


def test_resized_pictures_are_kept_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_picture(tmp_path / f"{index}.png", seed=index) for index in range(3)]
    calls: list[Path] = []
    original = images.load_picture
    monkeypatch.setattr(images, "load_picture", lambda file: (calls.append(file), original(file))[1])

    def reads(**options: Any) -> int:
        calls.clear()
        made = Pictures(files, [0, 1, 2], View(16), **options)
        first = [made[index][0] for index in range(3)]
        assert all(torch.equal(made[index][0], one) for index, one in enumerate(first)) or made.augment != "none"
        return len(calls)

    assert reads() == 6 and reads(keep=True) == reads(keep=True, shared=True) == 3
    assert reads(keep=True, augment="flip") == 3 and reads(keep=True, augment="crop_flip") == 6
    monkeypatch.setattr(images, "MOST_KEPT", 2000)
    assert reads(keep=True) == 6


def test_pictures_and_pixels_go_both_ways() -> None:
    values = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    assert torch.equal(pixels(from_pixels(values)), values) and from_pixels(values).size == (7, 5)


# ------------------------------------------------------------------------------------------------- the datamodule


def test_size_follows_the_data_and_state_restores_it(tmp_path: Path, private_cache: Path) -> None:
    for name in ("a", "b"):
        for index in range(4):
            write_picture(tmp_path / "set" / name / f"{index}.png", seed=index)
    real = ImageFolder(str(tmp_path / "set"))
    assert real.size == 224 and real.example(2).shape == (2, 3, 224, 224)
    assert ImageFolder(source="mini").size == 48 and ImageFolder(source="mini", size=32).size == 32
    file = tmp_path / "set" / "a" / "0.png"
    made = ImageFolder(str(tmp_path / "set"), size=24, resize="crop", interpolation="bilinear", normalise="inception")
    made.setup()
    other = ImageFolder(source="mini")
    other.load_state(made.state())
    assert torch.equal(other.read(file), made.read(file)) and made.read(file).shape == (3, 24, 24)
    for index, listed in enumerate(made.test_set.pictures):  # type: ignore[union-attr]
        assert torch.equal(made.read(listed), made.test_set[index][0])  # type: ignore[index]
    assert torch.equal(made.illustrate(made.read(file)[None])[0],
                       pixels(made.view.scaled(images.load_picture(file))))
    assert made.origin["normalise"] == "inception" and made.origin["input"] == "24 x 24, crop, bilinear"


def test_wrong_options(tmp_path: Path) -> None:
    for option, value, words in (("size", 4, "data.size: 4"), ("resize", "squish", "did you mean 'squash'"),
                                 ("interpolation", "area", "data.interpolation: 'area'"),
                                 ("augment", "mixup", "data.augment"), ("normalise", "imagnet", "'imagenet'")):
        with pytest.raises(ScionError, match=words):
            ImageFolder(**{option: value})


def test_a_batch_whatever_the_workers(tmp_path: Path, private_cache: Path) -> None:
    for name in ("a", "b"):
        for index in range(6):
            write_picture(tmp_path / "set" / name / f"{index}.jpg", 20 + index, 30, seed=index)

    def batches(workers: int, epochs: int) -> list[torch.Tensor]:
        data = ImageFolder(str(tmp_path / "set"), size=16, augment="flip", batch_size=3, num_workers=workers, seed=5)
        data.setup()
        loader: Any = data.train_dataloader()
        found = []
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            found = [inputs for inputs, _ in loader]
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(torch.equal(a, b) for a, b in zip(batches(0, 2), batches(2, 2), strict=True))
