"""The rule for depth, alpha, pages and profiles, against a slow reference: what DALI decodes of the stored bytes."""

import io
import struct
import zlib
from functools import cache

import numpy as np
import pytest
import tifffile
from nvidia.dali import Pipeline, fn, types
from PIL import Image, ImageCms

from tests.tools.shards.sources import picture
from tools.shards.decoding.pixels import to_srgb
from tools.shards.images import CheckedImage, ImagePolicy, check_image

PHOTO = Image.open(io.BytesIO(picture(3, 1))).convert("RGB")
RGB, GRAY = np.asarray(PHOTO), np.asarray(PHOTO.convert("L"))


@cache
def decoder() -> Pipeline:
    graph = Pipeline(1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        graph.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False))
    graph.build()
    return graph


def stored(content: bytes, name: str = "x.png", policy: ImagePolicy | None = None) -> tuple[CheckedImage, np.ndarray]:
    """Return a file as it is stored, and its pixels `[H, W, 3] int` as training decodes them."""
    checked = check_image(content, name, policy or ImagePolicy())
    decoder().feed_input("encoded", [np.frombuffer(checked.content, np.uint8)])
    pixels = np.asarray(decoder().run()[0][0]).astype(int)
    assert pixels.shape == (checked.height, checked.width, 3)
    seen = np.asarray(Image.open(io.BytesIO(checked.content)).convert("RGB"), int)
    assert np.abs(seen - pixels).max() <= 1
    return checked, pixels


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png(values: np.ndarray, depth: int, *extra: tuple[bytes, bytes], palette: bool = False) -> bytes:
    """Write `[H, W, C]` integers at any depth that PNG has; C is 1 for gray or a palette's index, 2, 3 or 4."""
    height, width, channels = values.shape
    color_type = 3 if palette else {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    bits = (values.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*e) for e in extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, rng: np.random.Generator) -> bytes:
    options: dict = {"byteorder": rng.choice(["<", ">"]), "compression": rng.choice(["none", "zlib"])}
    if values.shape[2] == 4:
        options["extrasamples"] = ["unassalpha"]
    if values.shape[2] > 1 and rng.random() < 0.3:
        options["tile"] = (32, 32)
    out, wide = io.BytesIO(), values.astype(np.uint16)
    tifffile.imwrite(
        out, wide if wide.shape[2] > 1 else wide[..., 0], photometric="rgb" if wide.shape[2] > 1 else None, **options
    )
    return out.getvalue()


def ppm(values: np.ndarray, maximum: int) -> bytes:
    height, width, channels = values.shape
    return b"P%d %d %d %d\n" % (5 if channels == 1 else 6, width, height, maximum) + values.astype(">u2").tobytes()


def depth_of(values: np.ndarray) -> int:
    return next(depth for depth in (8, 10, 12, 14, 16) if values.max() < 1 << depth)


def reference(values: np.ndarray, top: int, alpha_top: int) -> np.ndarray:
    """Compute the rule in floating point from `[H, W, 1..4]`; `top`: the value of white, `alpha_top`: that of opaque pixels."""
    colours = np.broadcast_to(values[..., : 1 if values.shape[2] < 3 else 3], (*values.shape[:2], 3)) * 255 / top
    if values.shape[2] in (1, 3):
        return colours
    alpha = np.rint(values[..., -1:] * 255 / alpha_top) / 255
    visible = colours[alpha[..., 0] > 0]
    return colours * alpha + (0 if len(visible) and (visible.mean(0) >= 224).all() else 255) * (1 - alpha)


def random_file(rng: np.random.Generator) -> tuple[str, bytes, np.ndarray | None]:
    """Return the kind of a file of any channels and bits, its bytes, and its pixels by the rule, None if it is refused."""
    height, width, channels = int(rng.integers(1, 40)), int(rng.integers(1, 40)), int(rng.integers(1, 5))
    held = int(rng.choice([1, 3, 8, 9, 10, 11, 12, 13, 14, 16]))  # bits that the values need
    values = rng.integers(0, 1 << held, (height, width, channels))
    depths = depth_of(values[..., : 1 if channels < 3 else 3]), depth_of(values[..., -1])
    kind = str(rng.choice(["png", "png", "tiff"] + ["ppm"] * (channels in (1, 3))))
    if kind == "ppm" and held <= 12 and rng.random() < 0.5:
        return kind, ppm(values, 4095), reference(values, 4095, 4095)
    file_depth = 16
    if kind == "ppm":
        content = ppm(values, 65535)
    elif kind == "tiff" and channels != 2:
        content = tiff(values, rng)
    else:
        file_depth = int(rng.choice([depth for depth in ((1, 2, 4, 8, 16) if channels == 1 else (8, 16)) if depth >= held]))
        content = png(values, file_depth)
        depths = depths if file_depth == 16 else (file_depth, file_depth)
    if channels > 1 and file_depth == 16:  # upper bytes, where they hold the picture
        is_refused = min(depths[: 1 if channels == 3 else 2]) < 16
        return kind, content, None if is_refused else reference(values >> 8, 255, 255)
    return kind, content, reference(values, *((1 << depth) - 1 for depth in depths))


def test_random_depths_modes_and_formats_decode_to_within_one_gray_level_of_the_rule() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        kind, content, expected = random_file(rng)
        if expected is None:
            with pytest.raises(ValueError, match="14 bits or less in 16"):
                stored(content, f"x.{kind}")
        else:
            assert np.abs(stored(content, f"x.{kind}")[1] - expected).max() < 1.001, (trial, kind)


def test_files_of_16_bits_that_hold_less_keep_their_picture() -> None:
    """12-bit values, and 8-bit values, in gray: none becomes black, and the depth is said. In colour they are refused."""
    for bits, said in ((8, "8 bits in 16"), (12, "12 bits in 16"), (16, "16-bit")):
        wide = (RGB.astype(int) * ((1 << bits) - 1) + 127) // 255
        checked, pixels = stored(png(wide[..., :1], 16))
        assert checked.changes == (said,)
        assert np.abs(pixels - RGB[..., :1]).max() <= 1
        if bits == 16:
            assert np.abs(stored(png(wide, 16))[1] - RGB).max() <= 1
        else:
            with pytest.raises(ValueError, match="14 bits or less in 16"):
                stored(png(wide, 16))
    out = io.BytesIO()
    tifffile.imwrite(out, RGB.transpose(2, 0, 1).astype(np.uint16), photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match="separate channels"):
        stored(out.getvalue(), "x.tif")


def icon(color: tuple[int, ...], side: int = 32) -> Image.Image:
    """A disc of one colour on nothing; what is under the nothing has the same colour, as many icons have it."""
    y, x = np.mgrid[:side, :side] - side / 2
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[..., :3] = color
    pixels[..., 3] = np.where(x * x + y * y < side * side / 9, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("color", "background"), [((0, 0, 0), 255), ((255, 255, 0), 255), ((250, 245, 240), 0)])
def test_transparent_icons_of_every_kind_lie_over_white_unless_they_are_white(color: tuple[int, ...], background: int) -> None:
    image = icon(color)
    palette = image.quantize(4)
    index = palette.getpixel((0, 0))
    gray = image.convert("LA")
    files = {
        "rgba.png": encode(image, "PNG"),
        "palette.png": encode(palette, "PNG", transparency=index),
        "x.gif": encode(image, "GIF"),
        "x.webp": encode(image, "WEBP", lossless=True, exact=True),
        "x.tif": encode(image, "TIFF"),
    }
    if len(set(color)) == 1:
        files["gray.png"] = encode(gray, "PNG")
    for name, content in files.items():
        checked, pixels = stored(content, name)
        assert "alpha" in checked.changes, name
        assert pixels[0, 0].tolist() == [background] * 3, name
        assert np.abs(pixels[16, 16] - color).max() <= 1, name


def test_a_transparent_colour_of_a_png_is_transparent_at_every_depth() -> None:
    for depth, channels in ((2, 1), (8, 1), (16, 1), (8, 3), (16, 3)):
        values = np.zeros((4, 4, channels), int)
        values[0] = (1 << depth) - 1
        values[1] = 256 if depth == 16 else 1
        content = png(values, depth, (b"tRNS", struct.pack(">H", 0) * channels))
        checked, pixels = stored(content)
        assert "alpha" in checked.changes
        assert (pixels[2:] == 255).all()
        assert pixels[1].max() <= 85


def test_of_several_frames_the_first_is_stored_and_the_others_are_counted() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    for name, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        checked, pixels = stored(encode(frames[0], name, save_all=True, append_images=frames[1:], **options), f"x.{name.lower()}")
        assert np.abs(pixels - (255, 0, 0)).max() <= 2, name
        assert checked.other_frames == 2, name
    checked, _ = stored(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])[:-4] + b"\xff" * 4, "x.tif")
    assert checked.other_frames in (1, 2)  # the last page is damaged
    checked, _ = stored(mpo := encode(frames[0], "MPO", save_all=True, append_images=frames[1:]), "x.jpg")
    assert (checked.content, checked.other_frames) == (mpo, 0)


def lossless_jpeg(gray: np.ndarray, precision: int = 8) -> bytes:
    """Write `[H, W]` as ITU T.81's lossless process: differences to the left, in Huffman codes of five bits each."""
    height, width = gray.shape
    values = gray.astype(int)
    predicted = np.hstack([np.vstack([[[1 << (precision - 1)]], values[:-1, :1]]), values[:, :-1]])
    bits = []
    for difference in (values - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        bits.append(f"{size:05b}" + (f"{difference + (difference < 0) * ((1 << size) - 1):0{size}b}" if size else ""))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8)).replace(b"\xff", b"\xff\0")

    def segment(kind: int, body: bytes) -> bytes:
        return bytes((0xFF, kind)) + (len(body) + 2).to_bytes(2, "big") + body

    frame = segment(0xC3, struct.pack(">BHHBBBB", precision, height, width, 1, 1, 0x11, 0))
    codes = segment(0xC4, bytes([0]) + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17)))
    return b"\xff\xd8" + frame + codes + segment(0xDA, bytes([1, 1, 0, 1, 0, 0])) + scan + b"\xff\xd9"


# 16x16 pixels of 200, 60, 30 by `cjpeg -arithmetic -quality 90`.
ARITHMETIC = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb0043000302020302020303030304030304050805050404050a070706080c0a0c0c0b0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ffdb00430103040405040509050509140d0b0d1414141414141414141414141414141414141414141414141414141414141414141414141414141414141414141414141414ffc90011080010001003012200021101031101ffcc000a0010100501101105ffda000c03010002110311003f00ff00b3adca420e0920ffd9"
)


def test_jpegs_that_not_every_decoder_reads_are_encoded_again() -> None:
    checked, pixels = stored(lossless_jpeg(GRAY), "x.jpg")
    assert (checked.extension, checked.changes) == ("png", ("lossless",))
    assert (pixels == GRAY[..., None]).all()
    assert stored(lossless_jpeg(GRAY).replace(b"\xff\xc3", b"\xff\xff\xff\xc3"), "x.jpg")[0].changes == ("lossless",)
    checked, pixels = stored(ARITHMETIC, "x.jpg")
    assert (checked.extension, checked.changes) == ("jpg", ("arithmetic",))
    assert np.abs(pixels - (200, 60, 30)).max() <= 3
    with pytest.raises(ValueError, match="a JPEG of 12 bits"):
        stored(lossless_jpeg(GRAY.astype(int) * 16, 12), "x.jpg")


def profile(space: bytes, gamma: float) -> bytes:
    """Write an ICC profile of version 2: RGB with the primaries of Adobe RGB (1998), or gray, and a plain gamma."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
    colours = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78), b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, xyz in zip((b"r", b"g", b"b"), colours, strict=True):
            tags |= {letter + b"XYZ": b"XYZ " + bytes(4) + fixed(*xyz), letter + b"TRC": curve}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ", bytes(12), b"acsp")
    return head + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48) + struct.pack(">I", len(tags)) + table + body


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ADOBE, DARK_GRAY = profile(b"RGB ", 2.2), profile(b"GRAY", 1.0)


def linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb(values: np.ndarray) -> np.ndarray:
    clipped = values.clip(0, 1)
    return np.where(clipped <= 0.0031308, clipped * 12.92, 1.055 * clipped ** (1 / 2.4) - 0.055) * 255


# From Adobe RGB (1998) to sRGB, both linear, by the definitions of their primaries.
ADOBE_TO_SRGB = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])


def test_colours_of_another_profile_become_srgb() -> None:
    for name, image_format in (("x.png", "PNG"), ("x.webp", "WEBP"), ("x.tif", "TIFF")):
        options = {"lossless": True} if image_format == "WEBP" else {}
        checked, pixels = stored(encode(PHOTO, image_format, icc_profile=ADOBE, **options), name)
        assert "colour profile" in checked.changes
        assert b"iCCP" not in checked.content
        assert np.abs(pixels - srgb((RGB / 255) ** 2.2 @ ADOBE_TO_SRGB.T)).max() <= 2
    checked, pixels = stored(encode(PHOTO, "JPEG", quality=100, icc_profile=ADOBE), "x.jpg")
    assert (checked.extension, checked.changes) == ("jpg", ("colour profile",))
    assert np.abs(pixels - srgb((RGB / 255) ** 2.2 @ ADOBE_TO_SRGB.T)).max() <= 12
    checked, pixels = stored(encode(PHOTO.convert("L"), "PNG", icc_profile=DARK_GRAY), "x.png")
    assert np.abs(pixels - srgb(GRAY / 255)[..., None]).max() <= 2


def ink_profile() -> bytes:
    """Write a CMYK profile (lut8 to Lab, two levels per ink): paper is white, black ink black, every other ink red."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lab = [
        (255, 128, 128) if not ink.any() else (0, 128, 128) if ink[3] else (136, 208, 195) for ink in inks
    ]  # red is 53, 80, 67
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + np.array(lab, np.uint8).tobytes() + ramp * 3
    head = struct.pack(">I4sI4s4s4s12s4s", 144 + len(table), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp")
    white = struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(28) + white + bytes(48) + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


# 16x16 pixels of the inks 55, 195, 225, 0 by libjpeg-turbo as YCCK (Adobe transform 2), quality 90.
YCCK = bytes.fromhex(
    "ffd8ffee000e41646f626500640000000002ffdb0043000302020302020303030304030304050805050404050a070706080c0a0c0c0b0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ffdb00430103040405040509050509140d0b0d1414141414141414141414141414141414141414141414141414141414141414141414141414141414141414141414141414ffc00014080010001004012200021101031101042200ffc400160001010100000000000000000000000000000709ffc40014100100000000000000000000000000000000ffc4001501010100000000000000000000000000000708ffc40014110100000000000000000000000000000000ffda000e040100021103110400003f00a6806847ed5301ffd9"
)


def test_cmyk_becomes_rgb_through_its_profile_if_it_has_one() -> None:
    checked, pixels = stored(YCCK, "x.jpg")
    assert checked.changes == ("cmyk",)
    assert np.abs(pixels - (200, 60, 30)).max() <= 3
    for inks, color in (((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))):
        image = Image.new("CMYK", (16, 16), inks)
        for name, image_format in (("x.jpg", "JPEG"), ("x.tif", "TIFF")):
            checked, pixels = stored(encode(image, image_format, icc_profile=ink_profile()), name)
            assert {"cmyk", "colour profile"} <= set(checked.changes)
            assert b"CMYK" not in checked.content
            assert np.abs(pixels - color).max() <= 12, (inks, name, pixels[0, 0])


def test_profiles_that_are_srgb_or_damaged_or_of_another_space_change_no_pixel() -> None:
    assert to_srgb(b"", "RGB") is None
    for blob in (SRGB, b"no profile", SRGB[:200], DARK_GRAY):
        content = encode(PHOTO, "JPEG", icc_profile=blob)
        assert stored(content, "x.jpg")[0].content == content
    cmyk = PHOTO.convert("CMYK")
    checked, pixels = stored(encode(cmyk, "TIFF", icc_profile=ADOBE), "x.tif")
    assert b"iCCP" not in checked.content
    assert np.abs(pixels - RGB).max() <= 2
