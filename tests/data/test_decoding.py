"""Image files become the pixels that they show, or are refused."""

from io import BytesIO
from random import Random

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.data.streaming import BadImageError, Cut, decode
from tests.data.photographs import photographs


def _file(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_image_of_the_size_is_returned_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(decode(_file(Image.fromarray(pixels)), Cut(32)), pixels)


COLORS = {
    # mode: (the stored pixel, the color it stands for)
    "1": (1, (255, 255, 255)),
    "L": (90, (90, 90, 90)),
    "LA": ((90, 10), (90, 90, 90)),
    "I;16": (90 * 257, (90, 90, 90)),
    "RGB": ((200, 100, 50), (200, 100, 50)),
    "RGBA": ((200, 100, 50, 3), (200, 100, 50)),
}


@pytest.mark.parametrize("mode", COLORS)
def test_every_mode_shows_its_color(mode):
    stored, color = COLORS[mode]
    found = decode(_file(Image.new(mode, (40, 30), stored)), Cut(8))
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8(color), (8, 8, 3)))


def test_palettes_with_transparency_and_cmyk_show_their_colors():
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    np.testing.assert_array_equal(decode(_file(palette, transparency=1), Cut(4))[0, 0], (10, 200, 30))
    # JPEG's own rounding of a plain color is a level or two.
    found = decode(_file(Image.new("RGB", (20, 20), (10, 200, 30)).convert("CMYK"), "JPEG", quality=100), Cut(4))
    assert abs(found[0, 0].astype(int) - (10, 200, 30)).max() <= 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_unknown_range_are_no_colors(mode):
    """As of microscopes; 16 bits that Pillow gives as 32 are a color."""
    stored = Image.new(mode, (20, 20), 124)
    with pytest.raises(BadImageError, match=f"32-bit numbers \\(mode '{mode}'\\) of unknown range"):
        decode(_file(stored, "TIFF"), Cut(8))
    wide = b"P5 20 20 65535\n" + np.full((20, 20), 90 * 257, ">u2").tobytes()
    np.testing.assert_array_equal(decode(wide, Cut(8)), np.full((8, 8, 3), 90, np.uint8))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_exif_orientation_turns_the_image(orientation):
    pixels = photographs()[0][:64, :96]
    turned = {3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(_file(Image.fromarray(pixels), exif=exif.tobytes()), Cut(48))
    np.testing.assert_array_equal(found, decode(_file(Image.fromarray(turned)), Cut(48)))


def test_evaluation_looks_at_the_middle_224_of_256():
    """Against resampling the whole image to a shorter side of 256 first: the filters differ at the edges of pixels."""
    pixels = photographs()[1]
    found = decode(_file(Image.fromarray(pixels)), Cut(224)).astype(int)
    whole = np.asarray(Image.fromarray(pixels).resize((round(640 * 256 / 427), 256), Image.Resampling.BILINEAR))
    left = (whole.shape[1] - 224) // 2
    expected = whole[16:240, left : left + 224].astype(int)
    assert abs(found - expected).mean() < 2  # of 255
    assert abs(found - expected[:, ::-1]).mean() > 20


def test_a_jpeg_decoded_at_a_fraction_of_its_size_shows_the_same():
    """Against the same pixels from a file that cannot be decoded in part."""
    picture = Image.fromarray(photographs()[0])
    jpeg = _file(picture, "JPEG", quality=95)
    plain = _file(Image.open(BytesIO(jpeg)))
    for size, seed in ((40, 0), (40, 1), (100, 2)):
        cut = Cut(size, 0.3)
        small, full = (decode(data, cut, Random(seed)).astype(int) for data in (jpeg, plain))
        assert abs(small - full).mean() < 2
        assert abs(small - full[::-1]).mean() > 20


def test_random_cuts_lie_inside_and_have_the_published_areas_and_ratios():
    cut, rng = Cut(8, 0.08), Random(0)
    boxes = np.array([cut.box(300, 200, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 300
    assert boxes[:, 3].max() <= 200
    area, ratio = width * height / 60_000, width / height
    # Sides are rounded to pixels.
    assert area.min() > 0.075
    assert 0.73 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.36
    small = area[area < 0.5]  # where nearly every draw fits, areas are uniform
    assert abs(np.mean(small) - 0.29) < 4 * 0.12 / np.sqrt(len(small))
    # A strip that no draw of such a ratio fits into: its middle, as wide as the ratio allows.
    assert cut.box(1000, 10, rng) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))


JPEG = _file(Image.fromarray(photographs()[0]), "JPEG")


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", JPEG[: len(JPEG) // 2], JPEG[:30], _file(Image.new("F", (8, 8), 0.5), "TIFF")],
    ids=["empty", "text", "truncated", "header", "floats"],
)
def test_what_cannot_be_decoded_is_refused(data):
    with pytest.raises(BadImageError, match=r"\w"):
        decode(data, Cut(8))
