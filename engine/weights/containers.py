"""Opening model files: what tensors are there, of what shape and stored type, and where their bytes lie.

A container is judged, not its meaning: every well-formed file opens, Flux or not (`detect` judges meaning). Read today:
safetensors (`.safetensors`, `.sft`), GGUF (`.gguf`), a shard index (`*.safetensors.index.json`), and a folder holding
one of these.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from ..errors import BadModelFile, MissingFile
from . import comfy_quant, fourbit
from .gguf_header import GgufHeader, StoredArray, read_gguf_header, strings_of
from .header import MAX_TENSORS, NO_PICKLES, Header, Parser, read_header, show
from .unreadable import folder_metadata

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
MODEL_SUFFIXES = (*SAFETENSORS_SUFFIXES, GGUF_SUFFIX)
INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20
MAX_FILE_NAME_BYTES = 4096
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
WHOLE_FILE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""What diffusers and transformers call an unsharded file; it is taken when a folder holds precision variants too."""
H = TypeVar("H", Header, GgufHeader)

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}
"""Stored type -> torch's name for it; what is not here, or not in this torch, is read as bytes."""


def torch_dtype(format: str) -> torch.dtype | None:
    """The dtype that holds `format` element by element, or None for packed types and those this torch lacks."""
    dtype = getattr(torch, TORCH_DTYPES.get(format, ""), None)
    return dtype if isinstance(dtype, torch.dtype) else None


class ModelFile:
    """One file on the disk, mapped into memory when first read.

    `identity` (device, inode, size, mtime in ns) tells whether the file was replaced. Nothing is held open before the
    first read; after `release` the map lives only as long as tensors that look into it.
    """

    def __init__(self, path: Path, stat: os.stat_result) -> None:
        self.path = path
        self.identity = identity(stat)
        self._map: mmap.mmap | None = None

    def view(self, offset: int, nbytes: int) -> Tensor:
        """Bytes `offset` to `offset + nbytes` as uint8 `(nbytes,)`, a copy-on-write view of the file."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._map is None:
            self._map = self._mapped()
        # torch keeps a reference to the map but no buffer lock, so the map must never be closed by hand
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset)

    def release(self) -> None:
        self._map = None

    def _mapped(self) -> mmap.mmap:
        with _opened(self.path) as file:
            if identity(os.fstat(file.fileno())) != self.identity:
                raise BadModelFile(self.path, "the file has changed since it was opened", advice="Load it again")
            try:
                return _copy_on_write(file.fileno())
            except OSError as error:
                raise BadModelFile(self.path, f"cannot be mapped into memory ({error.strerror})", advice=(
                    "Close other programs, or give programs more memory: a larger page file (Windows), a higher limit "
                    "(ulimit -v)")) from error


def _copy_on_write(fileno: int) -> mmap.mmap:
    """The whole file. Copy-on-write rather than read-only: a write into a weight costs its page, not the process.

    Linux would set memory aside for writes to all of it, and refuse where there is less memory than file.
    """
    if sys.platform == "linux":
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12
        return mmap.mmap(fileno, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(fileno, 0, access=mmap.ACCESS_COPY)


def identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.

    `shape` is logical and in torch's order, also for packed types; `format` the stored type's name (`"BF16"`);
    `nbytes` its size on disk; `offset` where its bytes begin in `file`.
    """

    shape: tuple[int, ...]
    format: str
    nbytes: int
    offset: int = field(repr=False)
    file: ModelFile = field(repr=False, compare=False)
    build: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)
    """Puts the bytes together, where they do not lie so in the file (`fourbit`)."""

    @property
    def is_mapped(self) -> bool:
        """Whether the bytes lie in the file as they are read."""
        return self.build is None

    def raw(self) -> Tensor:
        """The bytes, uint8 `(nbytes,)`, memory-mapped unless they are put together."""
        return self.file.view(self.offset, self.nbytes) if self.build is None else self.build()

    def read(self) -> Tensor:
        """The data, memory-mapped: `shape` in the stored dtype, or uint8 `(nbytes,)` for types torch cannot hold."""
        raw = self.raw()
        dtype = torch_dtype(self.format)
        if dtype is None:
            return raw
        if self.build is None and self.offset % dtype.itemsize:
            raw = raw.clone()  # the format does not promise alignment; kernels expect it
        return raw.view(dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One array of a GGUF file's metadata, such as the pieces of a tokenizer: type and number of its elements."""

    stored: StoredArray
    file: ModelFile = field(repr=False, compare=False)

    def read(self) -> list[str] | Tensor:
        """The texts, or the numbers `(count,)`."""
        raw = self.file.view(self.stored.offset, self.stored.nbytes).clone()
        dtype = torch_dtype(self.stored.kind)
        return strings_of(raw.numpy().tobytes(), self.stored.length) if dtype is None else raw.view(dtype)


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a file, a set of shards or a folder, by name; a context manager.

    `path` is what was opened, `metadata` the header's text entries (of all shards, the first to name a key counts),
    `files` the files behind it, `arrays` the arrays of a GGUF file's metadata. Tensors read before `close` stay valid
    after it.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str],
                 files: tuple[ModelFile, ...], arrays: Mapping[str, ArrayInfo] | None = None) -> None:
        self.path, self.metadata, self.files = path, metadata, files
        self.arrays: Mapping[str, ArrayInfo] = arrays or {}
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    def close(self) -> None:
        """Lets go of the files. Each is unmapped once no tensor read from it is left."""
        for file in self.files:
            file.release()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a `.safetensors`/`.sft` or `.gguf` file, a `*.safetensors.index.json`, or a folder with one of these.

    Only headers are read, whatever the files' size. Raises `MissingFile`, or `BadModelFile` for what is damaged, of an
    unknown kind, a pickle, or not supported.
    """
    path = Path(path)
    if os.path.isdir(path):
        checkpoint = open_checkpoint(_inside_folder(path))
        checkpoint.metadata.update(folder_metadata(path))
        return checkpoint
    name = path.name.lower()
    if not os.path.exists(path):  # unlike Path.exists, False for any name the system refuses
        raise MissingFile(f"{path}: there is no such file or folder", file=path)
    if name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    if name.endswith(SAFETENSORS_SUFFIXES):
        return _open_safetensors(path)
    if name.endswith(GGUF_SUFFIX):
        return _open_gguf(path)
    if name.endswith(PICKLE_SUFFIXES):
        raise BadModelFile(path, "this is a pickle, which can run code when opened, and is never opened",
                           expected=" or ".join(SAFETENSORS_SUFFIXES), found=path.suffix,
                           advice=NO_PICKLES)
    raise BadModelFile(path, "not a kind of model file known here",
                       expected=f"{', '.join(MODEL_SUFFIXES)}, {INDEX_SUFFIX} or a folder",
                       found=path.suffix or "no suffix")


def _opened(path: Path) -> Any:
    """The file, open for reading bytes; what the system refuses is said with the file's name."""
    try:
        return path.open("rb")
    except OSError as error:
        raise BadModelFile(path, f"cannot be opened ({error.strerror})") from error


def _open_safetensors(path: Path, fold: bool = True) -> Checkpoint:
    """`fold`: whether packed weights are put together here; those of shards may lie in several files."""
    header, source = _read(path, read_header)
    tensors = _tensors(header, source)
    return Checkpoint(path, _folded(tensors, header.metadata, path) if fold else tensors, header.metadata, (source,))


def _folded(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> dict[str, TensorInfo]:
    """Packed weights that are kept in several tensors, each as one."""
    return comfy_quant.folded(fourbit.folded(tensors, path), metadata, path)


def _open_gguf(path: Path) -> Checkpoint:
    header, source = _read(path, read_gguf_header)
    arrays = {name: ArrayInfo(stored, source) for name, stored in header.arrays.items()}
    return Checkpoint(path, _tensors(header, source), header.metadata, (source,), arrays)


def _read(path: Path, reader: Callable[[BinaryIO, Path, int], H]) -> tuple[H, ModelFile]:
    if not path.is_file():
        raise BadModelFile(path, "not a regular file")
    with _opened(path) as file:
        stat = os.fstat(file.fileno())
        try:
            header = reader(file, path, stat.st_size)
        except OSError as error:
            raise BadModelFile(path, f"cannot be read ({error.strerror})") from error
    return header, ModelFile(path, stat)


def _tensors(header: Header | GgufHeader, source: ModelFile) -> dict[str, TensorInfo]:
    return {name: TensorInfo(entry.shape, entry.format, entry.end - entry.begin, header.data_start + entry.begin,
                             source)
            for name, entry in header.entries.items()}


def _inside_folder(folder: Path) -> Path:
    """The one index or model file of a folder, as diffusers and transformers lay out a component."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise BadModelFile(folder, f"the folder cannot be read ({error.strerror})") from error
    indexes = [name for name in names if name.lower().endswith(INDEX_SUFFIX)]
    models = [name for name in names if name.lower().endswith(MODEL_SUFFIXES)]
    for candidates in (indexes, models):
        if len(candidates) == 1:
            return folder / candidates[0]
        preferred = [name for name in candidates if name.removesuffix(".index.json") in WHOLE_FILE_NAMES]
        if len(preferred) == 1:
            return folder / preferred[0]
        if candidates:
            raise BadModelFile(folder, "the folder holds several models", expected="one",
                               found=", ".join(map(show, candidates[:5])), advice="Name the file")
    if "model_index.json" in names:
        raise BadModelFile(folder, "this is the folder of a whole pipeline", expected="the folder of one component",
                           found="model_index.json", advice="Name its part, such as transformer, text_encoder or vae")
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise BadModelFile(folder, "the folder holds pickles only, which can run code when opened",
                           expected=".safetensors", found=", ".join(map(show, pickles[:5])),
                           advice="Get the .safetensors version")
    raise BadModelFile(folder, "the folder holds no model", expected=f"{', '.join(MODEL_SUFFIXES)} or {INDEX_SUFFIX}",
                       found=", ".join(map(show, names[:5])) or "nothing")


def _open_shards(path: Path) -> Checkpoint:
    """`{"weight_map": {TENSOR: FILE}, "metadata": {...}}`: every tensor in the shard the index names, and no other."""
    weight_map = _read_index(path)
    shards: dict[str, Checkpoint] = {}
    for file_name in sorted(set(weight_map.values())):
        shard_path = path.parent / _shard_name(path, file_name)
        if not os.path.isfile(shard_path):  # unlike Path.is_file, False for any name the system refuses
            raise BadModelFile(path, "incomplete download: a shard is missing", field="weight_map",
                               expected=show(file_name), found="no such file beside the index",
                               advice="Download it into the same folder")
        shards[file_name] = _open_safetensors(shard_path, fold=False)
    lost = sorted(name for name, file_name in weight_map.items() if name not in shards[file_name])
    stray = sorted(name for file_name, shard in shards.items() for name in shard if weight_map.get(name) != file_name)
    if lost or stray:
        raise BadModelFile(path, "the index and its shards do not belong together", field="weight_map",
                           expected=f"{len(weight_map)} tensors in {len(shards)} files",
                           found=f"{len(lost)} of them missing and {len(stray)} others, such as "
                                 + ", ".join(map(show, (lost + stray)[:5])),
                           advice="Download index and shards again, from one place")
    metadata: dict[str, str] = {}
    for shard in shards.values():
        metadata = {**shard.metadata, **metadata}
    tensors = _folded({name: shards[file_name][name] for name, file_name in weight_map.items()}, metadata, path)
    return Checkpoint(path, tensors, metadata, tuple(file for shard in shards.values() for file in shard.files))


def _read_index(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    if len(text) > MAX_INDEX_BYTES:
        raise BadModelFile(path, "the index is too large", expected=f"at most {MAX_INDEX_BYTES} bytes")
    parser = Parser(path, text, 0, len(text), "shard index")
    weight_map: dict[str, str] | None = None
    for key in parser.keys("index"):
        if key != "weight_map":
            parser.pass_value(show(key))
        elif weight_map is not None:
            parser.refuse("weight_map", "stands twice")
        else:
            weight_map = _read_weight_map(parser)
    parser.finish()
    if weight_map is None:
        raise BadModelFile(path, "not a shard index", field="weight_map", expected="tensor names and file names",
                           found="nothing")
    return weight_map


def _read_weight_map(parser: Parser) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in parser.keys("weight_map"):
        if name in weight_map:
            parser.refuse(f"weight_map {show(name)}", "stands twice")
        if parser.peek() != b'"':
            parser.refuse(f"weight_map {show(name)}", "must be the name of a file")
        file_name = parser.string(f"weight_map {show(name)}", MAX_FILE_NAME_BYTES)
        weight_map[name] = files.setdefault(file_name, file_name)
        if len(weight_map) > MAX_TENSORS:
            parser.refuse("weight_map", f"more than {MAX_TENSORS} tensors")
    return weight_map


def _shard_name(path: Path, name: str) -> str:
    """A name that stays in the index's folder on every system; links inside the folder are the user's own."""
    parts = PurePosixPath(name).parts
    if (not parts or "\\" in name or "\x00" in name or ".." in parts or PurePosixPath(name).is_absolute()
            or PureWindowsPath(name).drive or not name.lower().endswith(SAFETENSORS_SUFFIXES)):
        raise BadModelFile(path, "the index names a file it may not name", field="weight_map",
                           expected="a .safetensors file in the same folder", found=show(name))
    return name
