"""What a file is by its first bytes: people give all sorts of files for ONNX."""

from __future__ import annotations

__all__ = ["other_format"]

# (position, magic bytes, what it is); ORTM and TFL3 are FlatBuffers file identifiers.
_MAGIC = (
    (0, b"PK\x03\x04", "a zip archive (a PyTorch or Keras file, or a packed download)"),
    (0, b"\x1f\x8b", "a gzip file; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (0, b"BZh", "a bzip2 file; unpack it first"),
    (0, b"\xfd7zXZ", "an xz file; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model; run `git lfs pull`"),
    (4, b"ORTM", "an ONNX Runtime .ort file; give the .onnx file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite file; convert it with tf2onnx"),
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras); convert it with tf2onnx"),
    *((0, bytes((0x80, n)), "a pickle (PyTorch); export it with torch.onnx.export") for n in range(2, 6)),
)


def other_format(head: bytes) -> str | None:
    """What a file is by its first bytes, None if it may be ONNX."""
    for position, magic, what in _MAGIC:
        if head.startswith(magic, position):
            return what
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page; the download link gives a web page instead of the file"
    if text.startswith(b"<?xml"):
        return "an XML file (an OpenVINO model or a server's error message)"
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "a safetensors file, which holds weights without a graph; export the model to ONNX"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and text[:1].isascii():
        kind = "a JSON file" if text[:1] in (b"{", b"[") else "a text file"
        return f"{kind}; only the binary ONNX format is read"
    return None
