"""Says what a file is that is no image, and which kinds of files are looked at."""

from __future__ import annotations

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".pnm", ".pgm", ".ppm", ".pbm"),
}
KINDS = (
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xff\x0a", "JPEG XL, which cannot be read here"),
    (4, b"JXL ", "JPEG XL, which cannot be read here"),
    (4, b"ftypavif", "AVIF, which cannot be read here"),
    *((4, b"ftyp" + brand, "HEIC, which cannot be read here: save it as JPEG or PNG")
      for brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")),
    (4, b"ftyp", "a video"),
)  # fmt: skip


def describe_content(content: bytes) -> str:
    """Say what a file holds that no image decoder wants."""
    for offset, mark, kind in KINDS:
        if content.startswith(mark, offset):
            return f"not an image but {kind}"
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "not an image but a web page"
    if start.startswith((b"<?xml", b"<svg")):
        return "not an image but XML"
    if not content[:512].strip(b"\0"):
        return "not an image but zeros: it was not copied whole"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in content[:512]):
        return "not an image but text"
    return "not an image, or of a kind that cannot be read here"
