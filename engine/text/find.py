"""Which file holds which text encoder, and where its tokenizer comes from: the weights file, beside it, the host's own
copy, a local Hugging Face cache.

The first hit counts; nothing is downloaded. A hit of the other encoder's kind (CLIP's tokenizer.json in a folder where
T5's is looked for) is passed over; a hit that does not fit the encoder's embedding is an error, never skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

from ..errors import BadInput, BadModelFile, MissingFile
from ..weights import ROLE_NAMES, Checkpoint, TensorInfo, detect, open_checkpoint
from .ggml_vocab import PREFIX as GGML_PREFIX
from .ggml_vocab import ggml_kind
from .tokenizer import TOKENIZERS, ClipTokenizer, T5Tokenizer
from .vocabulary import (
    MAX_FILE_BYTES,
    Vocabulary,
    from_ggml,
    from_spiece,
    from_tokenizer_json,
    from_vocab_and_merges,
    json_kind,
    read_bytes,
    read_json,
)

METADATA_KEYS = ("tokenizer.json", "tokenizer.huggingface.json")
"""Ours, and the one of GGUF (docs/gguf.md)."""
SPIECE_TENSOR = "spiece_model"
ENCODERS_ADVICE = "FLUX.1 needs one CLIP-L and one T5 encoder: choose both"


@dataclass(frozen=True)
class Place:
    """What is known of a role's tokenizer: how its files are called and where others keep them."""

    title: str
    wanted: str                                 # for the error: what to put there
    embeddings: tuple[str, ...]                 # endings of the name of the encoder's token embedding
    siblings: tuple[str, ...]                   # folders of a diffusers pipeline, likeliest first
    repositories: tuple[tuple[str, str], ...]   # (folder pattern in the Hugging Face cache, folder inside)
    spiece: bool = False
    pair: bool = False                          # vocab.json + merges.txt


PLACES = {
    "clip_l": Place(
        title="CLIP-L", wanted="tokenizer.json, or vocab.json and merges.txt, of openai/clip-vit-large-patch14",
        embeddings=("text_model.embeddings.token_embedding.weight",), siblings=("tokenizer", "tokenizer_2"),
        repositories=(("models--openai--clip-vit-large-patch14", ""),
                      ("models--black-forest-labs--FLUX.1-*", "tokenizer")), pair=True),
    "t5": Place(
        title="T5", wanted="tokenizer.json or spiece.model of google/t5-v1_1-xxl",
        embeddings=("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"),
        siblings=("tokenizer_2", "tokenizer_3", "tokenizer"),
        repositories=(("models--google--t5-v1_1-xxl", ""),
                      ("models--black-forest-labs--FLUX.1-*", "tokenizer_2")), spiece=True),
}


@dataclass
class _Search:
    """One look-up: the role, the rows of the encoder's embedding, and what was passed over on the way."""

    role: str
    rows: int | None
    passed: list[str] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return PLACES[self.role]

    def json(self, data: bytes | str, source: str | Path) -> Vocabulary | None:
        tree = read_json(data, source)
        return from_tokenizer_json(tree, source) if self.takes(json_kind(tree), source) else None

    def takes(self, kind: str | None, source: str | Path) -> bool:
        """Whether a vocabulary found is of the kind wanted; one of another kind is noted."""
        expected = TOKENIZERS[self.role].kind
        if kind is not None and kind != expected:
            self.passed.append(f"{source} (holds {kind}, {self.place.title} needs {expected})")
        return kind == expected


def encoder_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The file of CLIP-L (`clip_l`) and of T5 (`t5`) among `paths`, in any order; one all-in-one file is enough.

    BadModelFile, naming what every file is, if an encoder is missing or there twice.
    """
    found: dict[str, Path] = {}
    told: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        with open_checkpoint(path) as checkpoint:
            detection = detect(checkpoint)
        told[path] = detection.family
        for role in PLACES:
            if role in detection.parts and not detection.parts[role].foreign:
                if role in found:
                    raise BadModelFile(path, f"both files hold {ROLE_NAMES[role]}: {found[role].name} too",
                                       advice=ENCODERS_ADVICE)
                found[role] = path
    missing = [ROLE_NAMES[role] for role in PLACES if role not in found]
    if missing:
        useless = next((path for path in told if path not in found.values()), paths[0])
        others = (f", {path.name} is {what}" for path, what in told.items() if path != useless)
        raise BadModelFile(useless, f"this is {told[useless]}{''.join(others)}", expected=" and ".join(missing),
                           advice=ENCODERS_ADVICE)
    return found


@overload
def find_tokenizer(role: Literal["t5"], weights: str | os.PathLike[str] | Checkpoint,
                   extra_dirs: Sequence[str | os.PathLike[str]] = ()) -> T5Tokenizer: ...
@overload
def find_tokenizer(role: Literal["clip_l"], weights: str | os.PathLike[str] | Checkpoint,
                   extra_dirs: Sequence[str | os.PathLike[str]] = ()) -> ClipTokenizer: ...
@overload
def find_tokenizer(role: str, weights: str | os.PathLike[str] | Checkpoint,
                   extra_dirs: Sequence[str | os.PathLike[str]] = ()) -> ClipTokenizer | T5Tokenizer: ...


def find_tokenizer(role: str, weights: str | os.PathLike[str] | Checkpoint,
                   extra_dirs: Sequence[str | os.PathLike[str]] = ()) -> ClipTokenizer | T5Tokenizer:
    """The tokenizer of the encoder in `weights` (a path or an open checkpoint); role "t5" or "clip_l".

    Looked for in this order, each place for tokenizer.json, then spiece.model (T5) or vocab.json + merges.txt (CLIP-L):
    inside the file (metadata `<role>.tokenizer.json` or `tokenizer.json`, the arrays `tokenizer.ggml.*` of GGUF, a
    uint8 tensor `spiece_model`); beside it
    (`<stem>.tokenizer.json` first; then a diffusers pipeline's `tokenizer` folders); `extra_dirs`; the Hugging Face
    cache. Raises MissingFile that says what to put where, BadModelFile for a damaged or foreign tokenizer.
    """
    if role not in PLACES:
        raise BadInput(f"no tokenizer is known for role {role!r}; expected one of {', '.join(PLACES)}")
    with nullcontext(weights) if isinstance(weights, Checkpoint) else open_checkpoint(weights) as checkpoint:
        search = _Search(role, _embedding_rows(checkpoint, role))
        vocabulary = next(_vocabularies(search, checkpoint, extra_dirs), None)
        if vocabulary is None:
            raise MissingFile(_missing(search, Path(checkpoint.path), extra_dirs), file=checkpoint.path)
    tokenizer = TOKENIZERS[role](vocabulary)
    if search.rows is not None:
        tokenizer.check_fits(search.rows)
    return tokenizer


def _vocabularies(search: _Search, checkpoint: Checkpoint,
                  extra_dirs: Sequence[str | os.PathLike[str]]) -> Iterator[Vocabulary]:
    yield from _inside(search, checkpoint)
    path = Path(checkpoint.path)
    for folder, stem in _beside(search.place, path):
        yield from _in_folder(search, folder, stem)
    for directory in extra_dirs:
        yield from _in_folder(search, Path(directory))
    for folder in _cached(search.place):
        yield from _in_folder(search, folder)


def _inside(search: _Search, checkpoint: Checkpoint) -> Iterator[Vocabulary]:
    for key in (f"{search.role}.{METADATA_KEYS[0]}", *METADATA_KEYS):
        text = checkpoint.metadata.get(key)
        if isinstance(text, str):
            found = search.json(text, f"{checkpoint.path} (metadata {key})")
            if found is not None:
                yield found
    source = f"{checkpoint.path} (metadata {GGML_PREFIX}*)"
    if search.takes(ggml_kind(checkpoint), source):
        yield from_ggml(checkpoint, source, search.rows)
    if search.place.spiece:
        for name, info in checkpoint.items():
            if name.split(".")[-1] == SPIECE_TENSOR:
                yield from_spiece(_tensor_bytes(info, name, checkpoint.path),
                                  f"{checkpoint.path} (tensor {name})", search.rows)


def _tensor_bytes(info: TensorInfo, name: str, path: Path) -> bytes:
    if info.format != "U8" or info.nbytes > MAX_FILE_BYTES:
        raise BadModelFile(path, "no SentencePiece model", field=name,
                           expected=f"U8, at most {MAX_FILE_BYTES} bytes", found=f"{info.format}, {info.nbytes} bytes")
    return info.read().flatten().numpy().tobytes()


def _beside(place: Place, path: Path) -> Iterator[tuple[Path, str]]:
    base = path if path.is_dir() else path.parent
    yield base, path.stem
    for parent in (base, base.parent):
        for name in place.siblings:
            yield parent / name, ""


def _in_folder(search: _Search, folder: Path, stem: str = "") -> Iterator[Vocabulary]:
    """Every tokenizer in a folder that is of the right kind."""
    for name in ([f"{stem}.tokenizer.json"] if stem else []) + ["tokenizer.json"]:
        data = _read(folder / name)
        if data is not None and (found := search.json(data, folder / name)) is not None:
            yield found
    if search.place.spiece and (data := _read(folder / "spiece.model")) is not None:
        yield from_spiece(data, folder / "spiece.model", search.rows)
    if search.place.pair:
        vocab, merges = _read(folder / "vocab.json"), _read(folder / "merges.txt")
        if vocab is not None and merges is not None:
            yield from_vocab_and_merges(vocab, merges, folder / "vocab.json")
        elif vocab is not None or merges is not None:
            there, lacking = ("vocab.json", "merges.txt") if vocab is not None else ("merges.txt", "vocab.json")
            search.passed.append(f"{folder / there} ({lacking} is not beside it)")


def _read(path: Path) -> bytes | None:
    try:
        return read_bytes(path) if path.is_file() else None
    except OSError as error:
        raise BadModelFile(path, f"cannot be read: {error.strerror or error}") from error


def _cached(place: Place) -> Iterator[Path]:
    """Snapshot folders of known repositories in the local cache, the one `refs/main` names first."""
    cache = _cache_folder()
    for pattern, inside in place.repositories:
        for repository in sorted(cache.glob(pattern)):
            main = (_read(repository / "refs" / "main") or b"").decode("utf-8", "replace").strip()
            snapshots = sorted((folder.name != main, folder) for folder in (repository / "snapshots").glob("*"))
            for _, snapshot in snapshots:
                yield snapshot / inside


def _cache_folder() -> Path:
    """As the huggingface_hub library finds it."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
                        ("XDG_CACHE_HOME", "huggingface/hub")):
        if value := os.environ.get(name):
            return Path(os.path.expanduser(value)) / below
    return Path(os.path.expanduser("~")) / ".cache" / "huggingface" / "hub"


def _embedding_rows(checkpoint: Checkpoint, role: str) -> int | None:
    for name, info in checkpoint.items():
        if any(name == ending or name.endswith("." + ending) for ending in PLACES[role].embeddings):
            return int(info.shape[0]) if info.shape else None
    return None


def _missing(search: _Search, path: Path, extra_dirs: Sequence[str | os.PathLike[str]]) -> str:
    folder = path if path.is_dir() else path.parent
    places = ["the file itself", str(folder), *map(str, extra_dirs), str(_cache_folder())]
    passed = f" Passed over: {'; '.join(search.passed[:5])}." if search.passed else ""
    return (f"{path.name}: no tokenizer found for this {search.place.title} encoder. Put {search.place.wanted} into "
            f"{folder} (tokenizer.json may be called {path.stem}.tokenizer.json there). "
            f"Looked in: {', '.join(places)}.{passed}")
