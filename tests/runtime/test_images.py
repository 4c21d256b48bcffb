"""Images in: what is found, what is refused before it is decoded, and what each kind of pixel means."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from runtime.tiny import picture, recorded

from reptool.errors import InputError
from reptool.runtime import BadImage, Decoded, Preprocess, find_images, load_image

PLAIN = Preprocess(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)


def pixels(path, channels=3):
    """The decoded pixels of a file that must be good."""
    decoded = load_image(path, channels)
    assert isinstance(decoded, Decoded), decoded
    return np.asarray(decoded.image), decoded.notes


def test_directory_is_sorted_and_flat(photos):
    """A directory gives its images by suffix in any case, sorted, without hidden files and without subdirectories."""
    picture(photos / "A.JPG", format="JPEG")
    picture(photos / ".hidden.png")
    (photos / "notes.txt").write_text("no image")
    (photos / "deep.png").mkdir()
    picture(photos / "deep.png" / "below.png")
    assert [path.name for path in find_images([photos])] == ["A.JPG", "blue.png", "green.png", "red.png"]


def test_files_keep_their_order(photos):
    """Files are taken as given, whatever their suffix."""
    odd = picture(photos / "photo.dat", format="PNG")
    assert find_images([photos / "red.png", odd, photos / "blue.png"]) == [photos / "red.png", odd, photos / "blue.png"]


def test_nothing_found_is_an_error(tmp_path):
    """No path, a missing path, a pipe and a directory without images are errors with their names."""
    (tmp_path / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "no images: 0 paths": [],
        "gone.png does not exist": [tmp_path / "gone.png"],
        "pipe.png is neither a file nor a directory": [tmp_path / "pipe.png"],
        r"no images: none of 2 entries has a suffix of \.bmp, \.jpeg, \.jpg, \.png, \.webp": [tmp_path],
    }
    for message, paths in cases.items():
        with pytest.raises(InputError, match=message):
            find_images(paths)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg"])
def test_four_formats_are_read(tmp_path, name):
    """JPEG, PNG, WEBP and BMP are decoded; grey survives even the lossy ones."""
    values, notes = pixels(picture(tmp_path / name, (128, 128, 128), size=(16, 16), quality=100))
    assert np.unique(values).tolist() == [128]
    assert notes == ()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "PPM"])
def test_other_formats_are_refused(tmp_path, kind):
    """A format outside the four is refused, even under the name of one of them."""
    bad = load_image(picture(tmp_path / "a.png", format=kind))
    assert isinstance(bad, BadImage)
    assert "not an image of the formats JPEG, PNG, WEBP, BMP" in bad.reason


def damaged(path, keep):
    """A noisy image file cut to a share of its bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp"])
def test_truncated_image_is_bad(tmp_path, name):
    """A file cut anywhere is a bad image with a reason, and the whole file is a good one."""
    assert isinstance(load_image(damaged(tmp_path / name, 1)), Decoded)
    for keep in (0, 0.1, 0.5, 0.9):
        bad = load_image(damaged(tmp_path / name, keep))
        assert isinstance(bad, BadImage)
        assert bad.reason


def bomb(path, side):
    """A PNG whose header claims side x side pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(
    ("side", "reason"),
    [(7072, "50013184 pixels, and the limit is 50000000"), (12000, "144000000 pixels"), (40000, "1600000000 pixels")],
)
def test_bomb_is_refused_by_its_header(tmp_path, side, reason):
    """Too many pixels are refused before one is decoded, with their number."""
    bad = load_image(bomb(tmp_path / "a.png", side))
    assert isinstance(bad, BadImage)
    assert reason in bad.reason


def test_limit_is_inclusive(photos):
    """An image of exactly the limit is read, and one pixel more is not."""
    assert isinstance(load_image(photos / "red.png", max_pixels=16), Decoded)
    assert isinstance(load_image(photos / "red.png", max_pixels=15), BadImage)


def test_extreme_shape_is_refused(tmp_path):
    """A thin image that would grow past the limit when resized is refused, not resized."""
    thin = Image.new("RGB", (60000, 1))
    with pytest.raises(ValueError, match="60000x1 would be resized to 13440000x224"):
        Preprocess((224, 224), PLAIN.mean, PLAIN.std)(thin)


def test_sixteen_bits_are_scaled(tmp_path):
    """16-bit grey is divided by 257, so that white stays white and the steps stay in order."""
    values = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found, notes = pixels(tmp_path / "deep.png", channels=1)
    assert found.ravel().tolist() == [17 * step for step in range(16)]
    assert notes == ("16-bit scaled by 1/257",)


MEANINGS = [
    ("RGBA", (255, 0, 0, 0), {}, (255, 255, 255), "transparency composited on white"),
    ("RGBA", (255, 0, 0, 255), {}, (255, 0, 0), "transparency composited on white"),
    ("LA", (0, 0), {}, (255, 255, 255), "transparency composited on white"),
    ("RGB", (9, 9, 9), {"transparency": (9, 9, 9)}, (255, 255, 255), "transparency composited on white"),
    ("P", 0, {"transparency": 0}, (255, 255, 255), "transparency composited on white"),
    ("L", 7, {}, (7, 7, 7), None),
    ("1", 1, {}, (255, 255, 255), None),
    ("CMYK", (0, 0, 0, 255), {"format": "JPEG"}, (0, 0, 0), "CMYK converted to RGB"),
]


@pytest.mark.parametrize(("mode", "colour", "options", "meaning", "note"), MEANINGS)
def test_pixels_have_one_meaning(tmp_path, *, mode, colour, options, meaning, note):
    """Transparency, palettes, bits and CMYK become the stated colour, and a conversion is noted."""
    found, notes = pixels(picture(tmp_path / "a.png", colour, mode=mode, **options))
    assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [list(meaning)]
    assert notes == ((note,) if note else ())


def test_sixteen_bits_with_transparency_are_refused(tmp_path):
    """A transparent colour among 16-bit pixels has no agreed meaning and is refused."""
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "a.png", transparency=999)
    bad = load_image(tmp_path / "a.png")
    assert isinstance(bad, BadImage)
    assert "transparent colour" in bad.reason


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_animation_is_refused(tmp_path, name):
    """An image with several frames is refused with their number; with one it is read."""
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / name, save_all=True, append_images=[second])
    bad = load_image(tmp_path / name)
    assert bad == BadImage(tmp_path / name, "animated, with 2 frames")
    first.save(tmp_path / name)
    assert isinstance(load_image(tmp_path / name), Decoded)


def test_camera_file_with_previews_is_a_photograph(tmp_path):
    """A JPEG that carries more pictures behind the first one is that first picture."""
    first, second = Image.new("RGB", (8, 8), (90, 90, 90)), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.unique(pixels(tmp_path / "a.jpg")[0]).tolist() == [90]


def test_orientation_is_applied(tmp_path):
    """EXIF orientation turns the image upright, and the note says so."""
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    turned, notes = pixels(tmp_path / "turned.png")
    assert turned.shape == (4, 2, 3)
    assert np.argwhere(turned[..., 0]).tolist() == [[0, 1]]
    assert notes == ("EXIF orientation applied",)
    assert pixels(tmp_path / "plain.png")[1] == ()


def test_pixel_digest_is_of_the_pixels(tmp_path):
    """Two files with the same pixels have one digest, and one changed pixel another."""
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.bmp")
    assert load_image(first).sha256 == load_image(second).sha256
    assert load_image(first).sha256 != load_image(picture(tmp_path / "c.png", (254, 0, 0))).sha256


def test_nothing_is_resampled_at_the_right_size():
    """An image of the model's size goes in as it is, normalised per channel."""
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = Preprocess((4, 4), (0.5, 0.25, 0.0), (0.5, 2.0, 1.0), "bicubic")(Image.fromarray(values))
    scaled = values.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    wanted = np.stack([(scaled[0] - np.float32(0.5)) / np.float32(0.5), (scaled[1] - np.float32(0.25)) / 2, scaled[2]])
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


def test_short_side_is_resized_then_the_centre_cropped():
    """The short side becomes size / crop_pct, and the centre is what Pillow's own resize has there."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8))
    found = Preprocess((8, 8), PLAIN.mean, PLAIN.std, "bicubic", 0.8)(image)
    resized = np.asarray(image.resize((13, 10), Image.Resampling.BICUBIC), np.float32)[1:9, 2:10]
    assert np.array_equal(found, (resized / np.float32(255)).transpose(2, 0, 1))
    other = Preprocess((8, 8), PLAIN.mean, PLAIN.std, "nearest", 0.8)(image)
    assert not np.array_equal(found, other)


def test_resize_takes_whole_pixels():
    """7 / 0.9 is resized to 7 pixels, not to 8, as is customary: at that size nothing is resampled."""
    values = np.random.default_rng(0).integers(0, 256, (7, 7, 3), np.uint8)
    found = Preprocess((7, 7), PLAIN.mean, PLAIN.std, "bilinear", 0.9)(Image.fromarray(values))
    assert np.array_equal(found, values.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_height_comes_first():
    """A size that is not square is height by width and is covered whole."""
    assert Preprocess((4, 8), PLAIN.mean, PLAIN.std)(Image.new("RGB", (30, 30))).shape == (3, 4, 8)


def test_grey_model_gets_one_channel(tmp_path):
    """A model of one channel gets grey pixels, and one number for mean and std."""
    prepare = Preprocess.from_metadata({}, (None, 1, 4, 4), mean=(0.0,), std=(1.0,))
    decoded = load_image(picture(tmp_path / "a.png", (51, 51, 51)), prepare.channels)
    assert np.array_equal(prepare(decoded.image), np.full((1, 4, 4), 51, np.float32) / np.float32(255))


def test_metadata_then_shape_then_custom():
    """The file's metadata goes first, then its fixed size, then ImageNet's custom; an override beats all."""
    foreign = Preprocess.from_metadata({})
    assert (foreign.size, foreign.mean, foreign.std) == ((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Preprocess.from_metadata({}, (None, 3, 32, 48)).size == (32, 48)
    ours = recorded((3, 6, 5), **{"reptool.interpolation": "bicubic", "reptool.crop_pct": "0.875"})
    found = Preprocess.from_metadata(ours, (None, 3, 32, 48), size=None)
    assert found == Preprocess((6, 5), (0.0,) * 3, (1.0,) * 3, "bicubic", 0.875)
    assert Preprocess.from_metadata(ours, size=9, mean=(0.1,), crop_pct=1.0) == Preprocess(
        (9, 9), (0.1,) * 3, (1.0,) * 3, "bicubic", 1.0
    )


BAD_PREPROCESSING = [
    ({"reptool.mean": "zero"}, {}, "reptool.mean is 'zero'"),
    ({"reptool.mean": "[1, [2], 3]"}, {}, "reptool.mean is"),
    ({"reptool.input_size": "[3, 224]"}, {}, "reptool.input_size is"),
    ({"reptool.crop_pct": "most"}, {}, "reptool.crop_pct is 'most'"),
    ({"reptool.interpolation": "lanczos"}, {}, "interpolation 'lanczos'"),
    ({}, {"crop_pct": 0.0}, r"crop_pct 0\.0"),
    ({}, {"crop_pct": 1.5}, r"crop_pct 1\.5"),
    ({}, {"crop_pct": float("nan")}, "crop_pct nan"),
    ({}, {"std": (1.0, 0.0, 1.0)}, r"std \(1\.0, 0\.0, 1\.0\)"),
    ({}, {"mean": (1.0, 2.0)}, r"mean \(1\.0, 2\.0\)"),
    ({}, {"mean": (float("nan"),)}, "mean .nan"),
    ({}, {"size": 0}, r"size \(0, 0\)"),
    ({}, {"channels": 4, "mean": (0.0,), "std": (1.0,)}, "channels 4"),
    ({}, {"channels": 1}, "the mean of a model with 1 input channels is not known"),
]


@pytest.mark.parametrize(("metadata", "overrides", "message"), BAD_PREPROCESSING)
def test_meaningless_preprocessing_is_refused(metadata, overrides, message):
    """A value without a meaning is refused by name, wherever it comes from."""
    with pytest.raises(InputError, match=message):
        Preprocess.from_metadata(metadata, **overrides)
