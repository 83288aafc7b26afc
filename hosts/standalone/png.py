"""PNG files with their workflow inside, as ComfyUI writes them; and the bounded way back from a PNG to its texts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...engine.errors import BadInput, BadWorkflow, NotFinite
from .folders import inside

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COMPRESSION = 4  # zlib level, ComfyUI's
MAX_TEXT = 16 * 2**20  # bytes of one text, unpacked
MAX_CHUNKS = 100_000
MAX_COUNTER = 10**9


def to_bytes(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3 or 4) 0..1 -> uint8, cut off and not rounded, as core does. NotFinite for NaN and infinity."""
    if image.ndim != 3 or image.shape[-1] not in (3, 4):
        raise BadInput(f"a picture must be (height, width, 3 or 4), found {tuple(image.shape)}")
    values = image.detach().float().cpu()
    if not torch.isfinite(values).all():
        raise NotFinite("the picture holds NaN or infinity; nothing was saved")
    return np.clip(255.0 * values.numpy(), 0, 255).astype(np.uint8)


def save_png(image: Tensor, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one picture (H, W, 3 or 4) to exactly `path`; a file there is replaced, and never half a file is seen."""
    replace_file(path, _encoded(image, metadata))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: there is the old one, or none, until the new one is whole."""
    temporary = _written(path.parent, data)
    with _removed_on_failure(temporary):
        os.replace(temporary, path)


def save_numbered(images: Tensor, root: Path, prefix: str, metadata: Mapping[str, Any] | None = None,
                  kind: str = "output") -> list[dict[str, str]]:
    """Write a batch (B, H, W, 3 or 4) as `<root>/<prefix>_00001_.png` ...; no file is ever replaced, also when several
    processes save at once. -> [{"filename", "subfolder", "type": kind}]. All pictures are checked before the first is
    written. The prefix may hold subfolders and the tokens of `expand_prefix`, and cannot leave `root`."""
    if images.ndim != 4 or images.shape[0] == 0:
        raise BadInput(f"pictures must be (batch, height, width, 3 or 4), found {tuple(images.shape)}")
    encoded = [_encoded(image, metadata) for image in images]
    start = inside(root, expand_prefix(prefix, images.shape[2], images.shape[1]).rstrip("/\\") + "_")
    start.parent.mkdir(parents=True, exist_ok=True)
    subfolder = start.parent.relative_to(root).as_posix()
    counter = _next_counter(start)
    saved = []
    for number, data in enumerate(encoded):
        name = start.name.replace("%batch_num%", str(number))
        temporary = _written(start.parent, data)
        with _removed_on_failure(temporary):
            counter = _reserve(start.parent, name, counter)
            file = f"{name}{counter:05}_.png"
            with _removed_on_failure(start.parent / file):
                os.replace(temporary, start.parent / file)
        saved.append({"filename": file, "subfolder": "" if subfolder == "." else subfolder, "type": kind})
        counter += 1
    return saved


def expand_prefix(prefix: str, width: int, height: int) -> str:
    """Tokens in a file name prefix: %width%, %height%, %year% ... %second% as core, %date:yyyy-MM-dd% as frontends."""
    now = time.localtime()
    values = {"width": str(width), "height": str(height), "year": f"{now.tm_year}", "month": f"{now.tm_mon:02}",
              "day": f"{now.tm_mday:02}", "hour": f"{now.tm_hour:02}", "minute": f"{now.tm_min:02}",
              "second": f"{now.tm_sec:02}"}

    def value_of(match: re.Match[str]) -> str:
        word = match.group(1)
        if word == "date" or word.startswith("date:"):
            return _date(word[5:] or "yyyy-MM-dd", now)
        return values.get(word, match.group(0))

    return re.sub(r"%([^%]+)%", value_of, prefix)


def _date(pattern: str, now: time.struct_time) -> str:
    """A date in a frontend's pattern: d, M, h, m, s once or twice, yy, yyyy; what no file name may hold becomes "-"."""
    parts = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def value_of(match: re.Match[str]) -> str:
        word = match[0]
        return str(now.tm_year)[-len(word):] if word[0] == "y" else f"{parts[word[0]]:0{len(word)}}"

    return re.sub(r'[/\\:*?"<>|]', "-", re.sub(r"d{1,2}|M{1,2}|h{1,2}|m{1,2}|s{1,2}|yyyy|yy", value_of, pattern))


def _encoded(image: Tensor, metadata: Mapping[str, Any] | None) -> bytes:
    """A PNG with a text for each item of `metadata`, its value as JSON."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, json.dumps(value))
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(buffer, "PNG", pnginfo=info, compress_level=COMPRESSION)
    return buffer.getvalue()


def _written(folder: Path, data: bytes) -> Path:
    """A finished temporary file beside the later one, so that giving it its name is one step of the file system."""
    handle, name = tempfile.mkstemp(prefix=".flux-kit-", suffix=".tmp", dir=folder)
    with _removed_on_failure(Path(name)):
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":  # mkstemp makes files private; pictures get what the user's umask says
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
    return Path(name)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            path.unlink(missing_ok=True)


def _next_counter(start: Path) -> int:
    """One more than the highest number of files `<prefix>_<number>_...` in the folder, as core counts; `start` is the
    prefix with its underscore."""
    wanted = re.compile(re.escape(os.path.normcase(start.name)) + r"(\d{1,9})(?:_|$|\.)")
    found = (wanted.match(os.path.normcase(name)) for name in os.listdir(start.parent))
    return max((int(match.group(1)) for match in found if match), default=0) + 1


def _reserve(folder: Path, name: str, counter: int) -> int:
    """The first free number from `counter`, its file made empty: whoever makes it first has it."""
    while counter < MAX_COUNTER:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / f"{name}{counter:05}_.png", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return counter
        counter += 1
    raise BadInput(f"{folder}: no free number left for {name}")


def read_text(path: Path, keys: Sequence[str]) -> dict[str, str]:
    """The texts of a PNG under `keys` (tEXt, zTXt, iTXt; the last of a key counts), with no pixel decoded.

    BadWorkflow for a file that is no PNG, is cut off, or unpacks a text beyond 16 MB.
    """
    found: dict[str, str] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(8) != PNG_SIGNATURE:
            raise BadWorkflow(f"{path.name}: not a PNG file", file=path)
        for _ in range(MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                raise BadWorkflow(f"{path.name}: the PNG is cut off after {size} bytes", file=path)
            length, kind = struct.unpack(">I4s", head)
            if length > size - file.tell() - 4:
                raise BadWorkflow(f"{path.name}: the PNG is cut off: a chunk of {length} bytes at {file.tell()} goes "
                                  f"beyond its end ({size})", file=path)
            if kind == b"IEND":
                return found
            if kind in _TEXTS:
                _read_chunk(path, file, length, kind, keys, found)
            else:
                file.seek(length + 4, os.SEEK_CUR)
    raise BadWorkflow(f"{path.name}: more than {MAX_CHUNKS} PNG chunks", file=path)


def _read_chunk(path: Path, file: BinaryIO, length: int, kind: bytes, keys: Sequence[str],
                found: dict[str, str]) -> None:
    if length > MAX_TEXT:
        raise BadWorkflow(f"{path.name}: a text of {length} bytes, more than any workflow has", file=path)
    data = file.read(length)
    (checksum,) = struct.unpack(">I", file.read(4))
    if zlib.crc32(kind + data) != checksum:
        raise BadWorkflow(f"{path.name}: a text in the PNG is damaged (wrong checksum)", file=path)
    key, _, rest = data.partition(b"\0")
    name = key.decode("latin-1")
    if name not in keys:
        return
    try:
        found[name] = _TEXTS[kind](rest)
    except (zlib.error, UnicodeDecodeError, ValueError) as error:
        raise BadWorkflow(f"{path.name}: the text {name} in the PNG cannot be read ({error})", file=path) from None


def _unpacked(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    text = stream.decompress(data, MAX_TEXT)
    if stream.unconsumed_tail:
        raise ValueError(f"unpacks to more than {MAX_TEXT // 2**20} MB")
    return text


def _plain_text(rest: bytes) -> str:
    return rest.decode("latin-1")


def _packed_text(rest: bytes) -> str:
    return _unpacked(rest[1:]).decode("latin-1")  # a byte for the method comes first


def _international_text(rest: bytes) -> str:
    """flag, method, language NUL, translated key NUL, text in UTF-8."""
    packed = rest[:1] == b"\1"
    _, _, text = rest[2:].partition(b"\0")[2].partition(b"\0")
    return (_unpacked(text) if packed else text).decode("utf-8")


_TEXTS = {b"tEXt": _plain_text, b"zTXt": _packed_text, b"iTXt": _international_text}
