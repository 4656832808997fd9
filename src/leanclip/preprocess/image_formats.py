"""Image formats that are read, and others, which are recognised by suffix or first bytes."""

import re

from PIL import features

# The decoders that may run; Pillow would pass EPS files to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
if "avif" in features.modules and features.check("avif"):  # since Pillow 11.2
    FORMATS += ("AVIF",)
    SUFFIXES_OF["AVIF"] = (".avif",)
SUFFIXES = frozenset(suffix for some in SUFFIXES_OF.values() for suffix in some)
# Raw formats: Pillow opens some as TIFF and decodes their small preview.
RAW_SUFFIXES = frozenset(
    (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
)
# Images in formats that are not read; they count as skipped samples.
UNREAD_SUFFIXES = (
    RAW_SUFFIXES
    | {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".psd", ".svg"}
    | {".eps", ".exr", ".hdr", ".tga", ".dds", ".pcx", ".qoi", ".xcf", ".dib", ".ico", ".icns"}
) - SUFFIXES
_OTHER_FORMATS = (  # by the first bytes
    (b"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", "HEIC"),
    (b"....ftypavi[fs]", "AVIF"),
    (b"....ftyp", "a video, or a raw format"),
    (b"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop's format"),
    (b"\0\0\1\0", "an icon"),
    (b"gimp xcf", "GIMP's format"),
    (b"v/1\1", "OpenEXR"),
    (b"#\\?RADIANCE", "Radiance HDR"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (rb"\s*(<\?xml.*)?<svg", "SVG"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"icns", "an icon"),
    (b"[(]\0\0\0.{8}\1\0", "a bitmap without its header"),
    (b"\n[\0-\5]\1[\1\2\4\x08]", "PCX"),
    (b".[\0\1][\1-\3\x09-\x0b].{13}[\x08\x0f\x10\x18 ]", "TGA"),  # it has no signature
)


def other_format(content: bytes) -> str | None:
    """The name of a format that is not read, by the first bytes of a file."""
    for start, what in _OTHER_FORMATS:
        if re.match(start, content[:1024], re.DOTALL):
            return what
    return None
