import hashlib
import math
import sys
from collections import Counter
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

from envs import photos
from esper.runtime.errors import ConfigError

SPLITS = ["train", "validation", "test"]
# Height, width, whether grey, and sha256 of the file: 16 hexadecimal digits
PHOTOS = {
    "astronaut": (504, 504, False, "88431cd9653ccd53"),
    "coffee": (396, 600, False, "cc02f8ca188b167c"),
    "motorcycle_left": (492, 732, False, "db18e9c415761740"),
    "rocket": (420, 636, False, "c2dd0de7c538df8d"),
    "brick": (504, 504, True, "7966caf324f6ba84"),
    "grass": (504, 504, True, "b6b6022426b38936"),
    "gravel": (504, 504, True, "c48615b451bf1e60"),
    "chelsea": (300, 444, False, "596aa1e7cb875eb7"),
    "camera": (504, 504, True, "b0793d2adda0fa6a"),
    "china": (420, 636, False, "8378025ad2519d64"),
    "flower": (420, 636, False, "a77f6ec41e353afd"),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(height, width):
    """Every pixel tells its place: row and column in thousandths, and 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows / 1000, columns / 1000, torch.zeros(height, width)])


def places(high):
    """Rows and columns of the photo at the crops' corners, [n, 2, 2, 2]: row or column, then the four corners."""
    return (1000 * high[:, :2, :: high.shape[2] - 1, :: high.shape[3] - 1]).round().long()


# ---- the photos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_photos_are_those_of_the_packages(split):
    """A version of a package with another file would make other results under the same name."""
    for name, photo in zip(photos.SPLITS[split], photos.load(split), strict=True):
        height, width, grey, digest = PHOTOS[name]
        assert hashlib.sha256(photos._file(name).read_bytes()).hexdigest()[:16] == digest, name
        assert photo.shape == (3, height, width)
        assert photo.dtype == torch.float32
        assert photo.min() >= 0
        assert 0.5 < photo.max() <= 1
        assert height % 12 == width % 12 == 0
        assert bool((photo == photo[:1]).all()) == grey, name
        pixels = np.array(Image.open(photos._file(name)))
        top = pixels[:height, :width].reshape(height, width, -1)
        assert np.array_equal((photo * 255).round().byte().permute(1, 2, 0)[..., : top.shape[2]].numpy(), top)


def test_splits_share_no_photo():
    names = [name for split in SPLITS for name in photos.SPLITS[split]]
    assert sorted(names) == sorted(PHOTOS)
    assert len(set(names)) == len(names)


def test_splits_share_no_content():
    """The thumbnails of no two photos are alike, not even flipped or turned; a photo is like its own crop's."""

    def thumbnail(photo):
        small = torch.nn.functional.interpolate(photo.mean(0)[None, None], (16, 16), mode="area")[0, 0]
        return (small - small.mean()) / small.std()

    small = [thumbnail(photo) for split in SPLITS for photo in photos.load(split)]
    for i, a in enumerate(small):
        views = [torch.rot90(b, turns) for b in (a, a.flip(0)) for turns in range(4)]
        for b in small[:i]:
            assert max(float((view * b).mean()) for view in views) < 0.8
    own = thumbnail(photos.load("test")[0][:, 10:-10, 10:-10])
    assert (own * small[-2]).mean() > 0.9


def test_loading_again_gives_the_same():
    assert photos.load("validation") is photos.load("validation")
    with pytest.raises(KeyError, match="unknown split 'dev'; available: train, validation, test"):
        photos.load("dev")


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ConfigError, match=r"camera\.png comes with scikit-image, .*pip install scikit-image"):
        photos._file("camera")
    with pytest.raises(ConfigError, match=r"china\.jpg comes with scikit-learn, .*pip install scikit-learn"):
        photos.load.__wrapped__("test")


def test_a_missing_file_names_the_version(monkeypatch, tmp_path):
    class Installed:
        version = "0.14.2"

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    with pytest.raises(ConfigError, match=r"camera\.png is missing: scikit-image 0\.14\.2 .*another version") as caught:
        photos._file("camera")
    assert str(tmp_path) in str(caught.value)


def test_packages_are_not_imported(monkeypatch):
    """It would take seconds."""
    for package in ("skimage", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it is an error
    for split in SPLITS:
        assert len(photos.load.__wrapped__(split)) == len(photos.SPLITS[split])


# ---- crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_is_the_downscaling_of_high(scale):
    """As Pillow makes it, which filters against aliasing."""
    train = photos.load("train")
    for low, high in (photos.crops(train, 3, 10, scale, generator()), photos.grid(train, 3, 10, scale)):
        assert low.shape == (3, 3, 10, 10)
        assert high.shape == (3, 3, 10 * scale, 10 * scale)
        for small, large in zip(low.flatten(0, 1), high.flatten(0, 1), strict=True):
            expected = np.array(Image.fromarray(large.numpy()).resize((10, 10), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(small.numpy(), expected.clip(0, 1), atol=1e-5)


def test_values_stay_within_bounds():
    """A bicubic kernel overshoots at the edges of a chessboard."""
    board = torch.zeros(3, 48, 48)
    board[:, :24, :24] = board[:, 24:, 24:] = 1.0
    low, _ = photos.grid([board], 1, 24, 2)
    up = photos.bicubic(low, 2)
    for images in (low, up):
        assert images.min() == 0
        assert images.max() == 1


def test_crops_depend_on_the_generator_alone():
    train = photos.load("train")
    first, again, other = (photos.crops(train, 6, 8, 2, generator(seed)) for seed in (1, 1, 2))
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a in first[1] for b in other[1])
    g = generator(1)
    following = [photos.crops(train, 6, 8, 2, g)[1] for _ in range(2)]
    assert torch.equal(following[0], first[1])
    assert not torch.equal(following[1], first[1])


def test_crops_don_t_touch_the_global_generator():
    before = torch.get_rng_state()
    photos.crops(photos.load("test"), 2, 8, 2, generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_are_anywhere_and_in_all_eight_positions():
    high = photos.crops([ramp(25, 37)], 2000, 6, 2, generator())[1]
    rows, columns = places(high).unbind(1)
    assert set(rows.flatten(1).amin(1).tolist()) == set(range(25 - 12 + 1))
    assert set(columns.flatten(1).amin(1).tolist()) == set(range(37 - 12 + 1))
    # The crop's pixels are those of the photo in order.
    assert ((rows.flatten(1).amax(1) - rows.flatten(1).amin(1)) == 11).all()
    down = [(int(r[1, 0] - r[0, 0]), int(r[0, 1] - r[0, 0])) for r in rows]
    right = [(int(c[1, 0] - c[0, 0]), int(c[0, 1] - c[0, 0])) for c in columns]
    seen = Counter(zip(down, right, strict=True))
    assert len(seen) == 8
    assert min(seen.values()) > 2000 / 8 * 0.75


def test_all_photos_are_cropped():
    shades = [torch.full((3, 24, 24), shade / 10) for shade in range(7)]
    high = photos.crops(shades, 700, 4, 2, generator())[1]
    counts = [int((high[:, 0, 0, 0] * 10).round().eq(shade).sum()) for shade in range(7)]
    assert min(counts) > 60


def test_a_photo_of_the_size_of_a_crop():
    photo = ramp(12, 12)
    high = photos.crops([photo], 20, 6, 2, generator())[1]
    assert {int(places(crop[None])[0, 0].amin()) for crop in high} == {0}
    assert torch.equal(photos.grid([photo], 1, 6, 2)[1][0], photo)


@pytest.mark.parametrize("make", [photos.grid, lambda *a: photos.crops(*a, generator())], ids=["grid", "crops"])
def test_a_crop_larger_than_a_photo_is_refused(make):
    with pytest.raises(ConfigError, match=r"crops of 7 x 7 pixels at scale 2 need photos of 14 x 14; .* 12 high"):
        make([ramp(30, 30), ramp(12, 30)], 2, 7, 2)


def test_grid_is_even_and_always_the_same():
    """14 crops of 10 pixels of two photos of 40 x 80: 7 each, in 2 rows of 4 and 3, from border to border."""
    low, high = photos.grid([ramp(40, 80), 0.5 + ramp(40, 80)], 14, 5, 2)
    corners = places(high)[:, :, 0, 0].tolist()
    expected = [(0, 0), (0, 23), (0, 47), (0, 70), (30, 0), (30, 35), (30, 70)]
    assert corners == [[r, c] for r, c in expected] + [[r + 500, c + 500] for r, c in expected]
    assert torch.equal(high[1], ramp(40, 80)[:, :10, 23:33])  # neither flipped nor turned
    assert all(
        torch.equal(a, b) for a, b in zip(photos.grid([ramp(40, 80)], 7, 5, 2), (low[:7], high[:7]), strict=True)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 33])
def test_grid_gives_as_many_as_asked_for_and_no_two_alike(count):
    for split in ("validation", "test"):
        low, high = photos.grid(photos.load(split), count, 12, 4)
        assert low.shape == (count, 3, 12, 12)
        assert len(high.flatten(1).unique(dim=0)) == count


def test_a_single_crop_is_in_the_middle():
    assert places(photos.grid([ramp(40, 80)], 1, 5, 2)[1])[0, :, 0, 0].tolist() == [15, 35]


# ---- bicubic and PSNR -----------------------------------------------------------------------------------------------


def test_bicubic_is_that_of_pillow():
    low = photos.grid(photos.load("test"), 2, 12, 3)[0]
    up = photos.bicubic(low, 3)
    assert up.shape == (2, 3, 36, 36)
    for small, large in zip(low.flatten(0, 1), up.flatten(0, 1), strict=True):
        expected = np.array(Image.fromarray(small.numpy()).resize((36, 36), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(large.numpy(), expected.clip(0, 1), atol=1e-5)


def test_bicubic_is_better_than_repeating_pixels():
    low, high = photos.grid(photos.load("test"), 4, 24, 2)
    repeated = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    better = photos.psnr_y(photos.bicubic(low, 2), high, 2) - photos.psnr_y(repeated, high, 2)
    assert (better > 0.3).all()


def test_psnr_by_hand():
    """Differences of Y of 21.9 (all of R, G and B by 0.1), 6.5481 (R by 0.1) and 24.966 (B by 1) out of 255."""
    black = torch.zeros(3, 3, 8, 8)
    other = black.clone()
    other[0] += 0.1
    other[1, 0] += 0.1
    other[2, 2] += 1.0
    expected = [20 * math.log10(255 / y) for y in (21.9, 6.5481, 24.966)]
    assert photos.psnr_y(black, other, 0).tolist() == pytest.approx(expected, abs=1e-4)
    assert expected[0] == pytest.approx(21.32, abs=0.01)
    assert photos.psnr_y(black, black, 0).tolist() == [math.inf] * 3


@pytest.mark.parametrize("border", [0, 1, 4])
def test_psnr_is_that_of_numpy(border):
    a, b = torch.rand(2, 5, 3, 20, 14, generator=generator()).unbind(0)

    def luma(image):
        red, green, blue = image.double().numpy()
        y = 16 + (65.481 * red + 128.553 * green + 24.966 * blue)
        return y[border : 20 - border, border : 14 - border]

    expected = [10 * np.log10(255**2 / np.mean((luma(x) - luma(y)) ** 2)) for x, y in zip(a, b, strict=True)]
    assert photos.psnr_y(a, b, border).tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(photos.psnr_y(a, b, border), photos.psnr_y(b, a, border))


def test_psnr_leaves_out_the_border():
    a = torch.rand(1, 3, 12, 10, generator=generator())
    b = (a + 0.01).contiguous()
    before = photos.psnr_y(a, b, 2)
    for rows, columns in ((slice(2), slice(None)), (slice(10, None), slice(None)), (slice(None), slice(2))):
        b[:, :, rows, columns] = 0.0
    b[:, :, :, 8:] = 0.0
    assert torch.equal(photos.psnr_y(a, b, 2), before)
    assert photos.psnr_y(a, b, 1) < before


def test_psnr_of_what_cannot_be_compared():
    a = torch.zeros(1, 3, 12, 8)
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 8\) and \(1, 3, 8, 12\) do not compare"):
        photos.psnr_y(a, a.mT, 0)
    for border in (4, -1):
        with pytest.raises(ValueError, match=f"a border of {border} leaves nothing of 12 x 8 pixels"):
            photos.psnr_y(a, a, border)
