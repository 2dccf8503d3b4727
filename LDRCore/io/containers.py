"""What a file holds, by its content: its format whatever its name says, and whether its values are all there."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import SimpleITK as sitk

from LDRCore.errors import RegistrationError

CHUNK_BYTES = 1 << 16  # decompressed at once; more than a processor's cache takes half as long again
MOST_INFLATED = 1100  # times as long as its gzip file is a file at most
_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 1 << 16  # of MetaImage and NRRD headers, at most
_GIPL_BYTES = 256  # of a header
_NIFTI_MAGIC = slice(344, 348)
_META_PLACEMENT = rb"(?:Offset|Position|Origin|TransformMatrix|Rotation|Orientation|ElementSpacing)\s*="
_NRRD_PLACEMENT = rb"space (?:origin|directions):"
_VALUE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def is_gzip(path: Path) -> bool:
    """Return whether a file is compressed by gzip."""
    with path.open("rb") as stream:
        return stream.read(2) == _GZIP


@contextmanager
def named_by_content(path: Path, suffixes: tuple[str, ...] = ()) -> Iterator[Path]:
    """Give a path of the same file whose suffix tells its format, by which SimpleITK chooses how to read it.

    What is refused meanwhile is refused by the name that the user knows.

    Args:
        path: of an existing file.
        suffixes: that fit its content. By default NIfTI, NRRD and MetaImage are known by their first bytes, and any
            other file keeps its name.
    """
    suffixes = suffixes or _suffixes(path)
    if not suffixes or path.name.lower().endswith(suffixes):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / f"image{suffixes[0]}"
        try:
            os.symlink(path.resolve(), named)
        except OSError:  # not allowed on every Windows
            shutil.copyfile(path, named)
        try:
            yield named
        except RegistrationError as error:
            raise RegistrationError(str(error).replace(str(named), str(path))) from None


def _suffixes(path: Path) -> tuple[str, ...]:
    """Return the suffixes that fit a file's content, none where the content is not known."""
    with path.open("rb") as stream:
        first = stream.read(4096)
    compressed = first[:2] == _GZIP
    if compressed:
        try:
            first = zlib.decompressobj(31).decompress(first)
        except zlib.error:
            return ()
    if first[_NIFTI_MAGIC] == b"n+1\0":
        return (".nii.gz",) if compressed else (".nii", ".nii.gz")
    if compressed:
        return ()
    if first.startswith(b"NRRD000"):
        return (".nrrd", ".nhdr")
    if re.match(rb"(Comment = [^\n]*\n)?(ObjectType|NDims)\s*=", first):
        return (".mha", ".mhd")
    return ()


def inflated(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a zlib or gzip stream in pieces; what follows it is passed over.

    Raises:
        EOFError: the stream is cut off.
        zlib.error: it is damaged.
    """
    data = stream.read(CHUNK_BYTES)
    while True:
        inflater = zlib.decompressobj(47)  # zlib or gzip, whichever the first bytes say
        while not inflater.eof:
            piece = inflater.decompress(data, CHUNK_BYTES)
            if not piece and not data:
                raise EOFError
            yield piece
            data = inflater.unconsumed_tail or (b"" if inflater.eof else stream.read(CHUNK_BYTES))
        data = inflater.unused_data
        if len(data) < len(_GZIP):
            data += stream.read(CHUNK_BYTES)
        if not data.startswith(_GZIP):  # no further part of a gzip file
            return


def inflated_bytes(stream: BinaryIO) -> int:
    """Count the bytes that `inflated` yields."""
    return sum(map(len, inflated(stream)))


def check_gzip(path: Path, name: str) -> None:
    """Refuse a gzip file that is cut off or damaged.

    Raises:
        RegistrationError: see above.
    """
    try:
        with path.open("rb") as stream:
            inflated_bytes(stream)
    except (EOFError, OSError, zlib.error):
        raise damaged(path, name) from None


def check_complete(path: Path, name: str) -> None:
    """Refuse a MetaImage, NRRD, VTK or GIPL file that lacks values or whose compressed values are damaged.

    SimpleITK reads some of these without a word, with zeros or noise where values are missing.

    Args:
        path: of a file whose suffix tells its format.
        name: what the image is to the user, for messages.

    Raises:
        RegistrationError: it is cut off, damaged, or its values are in another file that is missing.
    """
    check_placement(path, name)
    try:
        if path.suffix.lower() in (".mha", ".mhd"):
            _check_meta(path, name)
        elif path.suffix.lower() in (".nrrd", ".nhdr"):
            _check_nrrd(path, name)
        elif path.suffix.lower() in (".vtk", ".gipl"):
            _check_length(path)
    except (EOFError, zlib.error):
        raise damaged(path, name) from None
    except OSError as error:
        raise RegistrationError(f"{name} must be a readable file, got {path} ({error.strerror})") from None


def check_placement(path: Path, name: str) -> None:
    """Refuse a MetaImage or NRRD file whose placement is not finite: SimpleITK puts it elsewhere without a word.

    Args:
        path: of a file whose suffix tells its format.
        name: what the image is to the user, for messages.

    Raises:
        RegistrationError: see above.
    """
    keys = {".mha": _META_PLACEMENT, ".mhd": _META_PLACEMENT, ".nrrd": _NRRD_PLACEMENT, ".nhdr": _NRRD_PLACEMENT}
    key = keys.get(path.suffix.lower())
    if key is None:
        return
    with path.open("rb") as stream:
        text = stream.read(_HEADER_BYTES)
    end = re.search(rb"^ElementDataFile|\r?\n\r?\n", text, re.MULTILINE)
    placement = re.findall(rb"^" + key + rb"([^\r\n]*)", text[: end.start()] if end else text, re.MULTILINE)
    words = [word.decode("latin-1") for word in re.findall(rb"[^\s(),]+", b" ".join(placement))]
    wrong = [word for word in words if not _is_finite(word)]
    if wrong:
        raise RegistrationError(
            f"{name} must have a finite origin, direction and spacing, got {' '.join(wrong)[:60]} in {path}"
        )


def _is_finite(word: str) -> bool:
    """Return whether a word of a placement is a finite number, or NRRD's "none" for an axis that is none in space."""
    try:
        return word == "none" or math.isfinite(float(word))
    except ValueError:
        return False


def damaged(path: Path, name: str) -> RegistrationError:
    """Return the error for a file that lacks values."""
    return RegistrationError(f"{name} must be a whole file, got {path} (cut off or damaged)")


def _expected_bytes(path: Path) -> int:
    """Return how many bytes the values of an image take uncompressed; 0 where SimpleITK cannot read its header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 0
    bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    return math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * (_VALUE_BYTES[bits[1]] if bits else 1)


def _check_length(path: Path) -> None:
    with path.open("rb") as stream:
        text = stream.read(_HEADER_BYTES)
    offset = _GIPL_BYTES
    if path.suffix.lower() == ".vtk":
        end = re.search(rb"^(LOOKUP_TABLE|VECTORS|TENSORS|COLOR_SCALARS)[^\n]*\n", text, re.MULTILINE)
        if end is None or b"BINARY" not in text[:1024]:
            return
        offset = end.end()
    if path.stat().st_size < offset + _expected_bytes(path):
        raise EOFError


def _data_stream(path: Path, data_file: str, offset: int, name: str) -> BinaryIO:
    """Open the values of a header: in the same file after `offset` bytes, or in a file of their own."""
    if not data_file:
        stream = path.open("rb")
        stream.seek(offset)
        return stream
    values = path.parent / data_file
    if not values.is_file():
        raise RegistrationError(f"{name} must lie beside the file of its values, got no {values}")
    return values.open("rb")


def _check_meta(path: Path, name: str) -> None:
    with path.open("rb") as stream:
        text = stream.read(_HEADER_BYTES)
    end = re.search(rb"^ElementDataFile\s*=\s*([^\r\n]*?)\s*?\r?\n", text, re.MULTILINE)
    if end is None:
        raise EOFError
    fields = {
        key.strip().lower(): value.strip()
        for key, _, value in (line.partition("=") for line in text[: end.start()].decode("latin-1").splitlines())
    }
    data_file = end[1].decode("utf-8", "replace")
    if data_file.upper().startswith("LIST") or "%" in data_file or fields.get("binarydata", "true").lower() == "false":
        return
    with _data_stream(path, "" if data_file.upper() == "LOCAL" else data_file, end.end(), name) as stream:
        if fields.get("compresseddata", "false").lower() == "true":
            length = inflated_bytes(stream)
        else:
            length = os.fstat(stream.fileno()).st_size - stream.tell()
    if length < _expected_bytes(path):
        raise EOFError


def _check_nrrd(path: Path, name: str) -> None:
    with path.open("rb") as stream:
        text = stream.read(_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n", text)
    header = text[: end.start()] if end else text
    if not re.search(rb"^encoding:\s*(gz|gzip)\s*$", header, re.MULTILINE | re.IGNORECASE):
        return  # SimpleITK says itself that uncompressed values are missing
    listed = re.search(rb"^data ?file:\s*([^\r\n]+)", header, re.MULTILINE | re.IGNORECASE)
    data_file = listed[1].decode("utf-8", "replace").strip() if listed else ""
    if data_file.upper().startswith("LIST") or "%" in data_file:
        return
    if not data_file and end is None:
        raise EOFError
    with _data_stream(path, data_file, end.end() if end else 0, name) as stream:
        if inflated_bytes(stream) < _expected_bytes(path):
            raise EOFError
