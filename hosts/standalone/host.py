"""The standalone host: the port of `hosts` on the engine alone, on one device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from ...engine import sampling
from ...engine.adapters import Options, Row, Share, norm_share
from ...engine.errors import BadInput, BadModelFile, FluxKitError, Interrupted, NotFinite
from ...engine.memory import MODES, TABLE_SHARE, TorchDevice, activations
from ...engine.models.autoencoder import Autoencoder
from ...engine.models.clip import ClipText
from ...engine.models.flux import Flux
from ...engine.models.modulation import ModulationTable
from ...engine.models.t5 import T5Encoder
from ...engine.models.tiling import ROWS, decode_tiled
from ...engine.models.vision import Redux, SiglipVision, check_pictures, to_pixels
from ...engine.sampling import Denoiser, cfg_window_in_sigmas, process_out, table_for
from ...engine.specs import FLUX_AE
from ...engine.text import TextEncoders, encoder_files, find_tokenizer
from ...engine.weights import load, open_checkpoint
from .. import Conditioning, Latent, Metadata, Progress, current, depth
from ..fingerprint import Watch, fingerprint
from ..loras import FILES, TEXT_ROLES, input_width
from ..names import place_for
from . import io as _io
from . import lora
from .folders import Folders
from .images import read_image
from .memory import Residence, Resident
from .objects import (
    Clip,
    ClipVision,
    Guider,
    Model,
    Noise,
    Sampled,
    StyleModel,
    Vae,
    check_latent_size,
    checked_samples,
    schedule_sigmas,
)
from .png import save_numbered, save_png

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
ProgressBar = Callable[[int], Progress]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TILED_FROM = 2 * 1024 * 1024 // FLUX_AE.downscale**2  # latent pixels of an item


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes CUDA, then MPS, then the CPU. BadInput if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"device {name!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise BadInput("device 'meta' holds no data; choose cpu, cuda or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a name; "auto": bf16 where the device has it in hardware, else fp16; fp32 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise BadInput(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if device.type == "cpu" else torch.float16


def metadata_of(hidden: Any) -> dict[str, Any]:
    """What a saved picture carries, from a node's `cls.hidden`."""
    prompt = {} if hidden.prompt is None else {"prompt": hidden.prompt}
    return {**prompt, **(hidden.extra_pnginfo or {})}


class StandaloneHost:
    """Model folders, one device and dtype, and the engine. Loaded models are shared as long as something holds them.

    `progress_bar(total)` makes what reports steps; `save_to(number)` names the file of the n-th saved picture of this
    host instead of `<output>/<prefix>_00001_.png`. `tell` hears, line by line, how stages use the device's memory.
    """

    name = "standalone"

    def __init__(self, folders: Folders, *, device: str = "auto", dtype: str = "auto", memory: str = "auto",
                 progress_bar: ProgressBar | None = None, save_to: Callable[[int], Path] | None = None,
                 previews: bool = False, tell: Callable[[str], None] = log.info) -> None:
        if memory not in MODES:
            raise BadInput(f"memory {memory!r} is not one of {', '.join(MODES)}")
        self.folders = folders
        self.device = choose_device("cpu" if memory == "cpu" else device)
        self.dtype = choose_dtype(dtype, self.device)
        self.memory = memory
        self.residence = Residence(TorchDevice(self.device), memory, tell)
        self.saved: list[Path] = []
        self._save_to = save_to
        self._progress_bar = progress_bar
        self._previews = previews
        self._preview_factors: tuple[nn.Module, tuple[Tensor, Tensor]] | None = None
        self._interrupt = threading.Event()
        self._named: dict[tuple[str, str], Path] = {}
        self._loaded: WeakValueDictionary[tuple[Any, ...], nn.Module] = WeakValueDictionary()
        self._watches: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()

    @property
    def io(self) -> ModuleType:
        return _io

    # -- files
    def list_files(self, kind: str) -> list[str]:
        return sorted({*self.folders.list_files(kind), *(name for of_kind, name in self._named if of_kind == kind)})

    def resolve_file(self, kind: str, name: str) -> Path:
        named = self._named.get((kind, name)) if isinstance(name, str) else None
        return named or self.folders.resolve_file(kind, name)

    def new_file(self, kind: str, name: str) -> Path:
        return place_for(kind, name, self.folders.roots(kind))

    def name_file(self, kind: str, path: Path) -> str:
        """The name by which nodes reach a file that the user named by its path, wherever it lies."""
        real = path.resolve()
        for root in (root.resolve() for root in self.folders.roots(kind)):
            if real.is_relative_to(root):
                name = real.relative_to(root).as_posix()
                if name in self.folders.list_files(kind) and self.folders.resolve_file(kind, name).samefile(real):
                    return name
        parts = real.parts[1:]
        tails = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))  # as much as tells two files apart
        name = next(tail for tail in tails if self._named.get((kind, tail), real) == real)
        self._named[kind, name] = real
        return name

    def input_fingerprint(self, name: str | None) -> tuple[str, int, int] | None:
        """Changes when the picture's file does."""
        if name is None:
            return None
        status = (path := self.resolve_file("input", name)).stat()
        return str(path), status.st_mtime_ns, status.st_size

    def load_image(self, name: str) -> tuple[Tensor, Tensor]:
        """IMAGE and MASK of a picture in the input folders."""
        return read_image(self.resolve_file("input", name))

    # -- objects
    def _module(self, path: Path, role: str, kind: type[M], dtype: torch.dtype) -> M:
        """The part `role` of a model file, as it is on disk now, in host memory; one copy per file and dtype."""
        key = (*fingerprint(path), role, dtype)
        module = self._loaded.get(key)
        if module is None:
            log.info("loading the %s of %s", role, path.name)
            with open_checkpoint(path) as checkpoint:
                module = load(checkpoint, role, dtype=dtype)
                if isinstance(module, Flux):
                    ModulationTable(module, share=TABLE_SHARE)
                self._watches[module] = Watch((file.path, file.identity) for file in checkpoint.files)
            self._loaded[key] = module
        if not isinstance(module, kind):
            raise BadModelFile(path, f"its {role} is a {type(module).__name__}", expected=kind.__name__)
        return module

    def with_loras(self, model: Model, clip: Clip | None, rows: Sequence[Row], *, mode: str = "auto",
                   strict: bool = True) -> tuple[Model, Clip | None, str]:
        made, text, lines = lora.with_loras(
            model, clip, rows, mode=mode, strict=strict, resolve=partial(self.resolve_file, "loras"),
            device=self.device, moves=self.residence.moves)
        return made, text, "\n".join(lines)

    def lora_share(self, model: Model, path: Path) -> Share:
        return norm_share(model.flux, FILES.read(path, Options(skip_broken=True)))

    def img_in_width(self, model: Model) -> int | None:
        return input_width(model.loras, model.flux.spec.in_channels)

    def drops_control(self, model: Model) -> bool:
        return False

    def embeds_guidance(self, model: Model) -> bool | None:
        return model.flux.spec.guidance_embed

    def with_shift(self, model: Model, mu: float) -> Model:
        return replace(model, table=replace(model.table, mu=mu))

    def _resident(self, module: nn.Module, role: str, dtype: torch.dtype) -> Resident:
        return Resident(module, role, dtype, self._watches.get(module, Watch({})))

    def guard(self) -> Callable[[], None]:
        """For a run that begins: raises FileChanged, when called, if a file was changed that was as loaded at first."""
        stale = [watch for watch in self._watches.values() if watch.change() is not None]

        def check() -> None:
            for watch in list(self._watches.values()):
                if watch not in stale:
                    watch.check()

        return check

    def load_model(self, path: Path) -> Model:
        """MODEL of the transformer in a file (alone or part of an all-in-one)."""
        return self.wrap_model(self._module(path, "transformer", Flux, self.dtype), path)

    def load_text_encoders(self, paths: Sequence[Path], *, device: str | None = None) -> Clip:
        """CLIP from files that together hold CLIP-L and T5, in any order. `device` None: the host's own."""
        found = encoder_files(paths)
        place = self.device if device is None else choose_device(device)
        dtype = self.dtype if place == self.device else choose_dtype("auto", place)
        clip = self._module(found["clip_l"], "clip_l", ClipText, dtype)
        t5 = self._module(found["t5"], "t5", T5Encoder, dtype)
        beside = self.folders.roots("text_encoders")
        encoders = TextEncoders(clip, find_tokenizer("clip_l", found["clip_l"], beside),
                                t5, find_tokenizer("t5", found["t5"], beside))
        return Clip(encoders, found["t5"], dtype, on_cpu=device is not None and place.type == "cpu")

    def load_vae(self, path: Path) -> Vae:
        """VAE of the autoencoder in a file."""
        return self.wrap_vae(self._module(path, "vae", Autoencoder, self._wide_dtype), path)

    def load_clip_vision(self, path: Path) -> ClipVision:
        """CLIP_VISION of the SigLIP vision encoder in a file."""
        return self.wrap_clip_vision(self._module(path, "vision", SiglipVision, self._wide_dtype), path)

    def load_style_model(self, path: Path) -> StyleModel:
        """STYLE_MODEL of the Redux projector in a file."""
        return self.wrap_style_model(self._module(path, "redux", Redux, self._wide_dtype), path)

    @property
    def _wide_dtype(self) -> torch.dtype:
        """Of models that are small and overflow in fp16: bf16 where the transformer runs in it, else fp32."""
        bf16 = self.dtype == torch.bfloat16 and self.device.type == "cuda"
        return torch.bfloat16 if bf16 else torch.float32

    def wrap_model(self, flux: Flux, path: str | Path) -> Model:
        return Model(flux, table_for(flux.spec), Path(path))

    def wrap_clip(self, text_encoders: TextEncoders, path: str | Path) -> Clip:
        return Clip(text_encoders, Path(path), self.dtype)

    def wrap_vae(self, autoencoder: Autoencoder, path: str | Path) -> Vae:
        return Vae(autoencoder, Path(path))

    def wrap_clip_vision(self, vision: SiglipVision, path: str | Path) -> ClipVision:
        return ClipVision(vision, Path(path))

    def wrap_style_model(self, redux: Redux, path: str | Path) -> StyleModel:
        return StyleModel(redux, Path(path))

    # -- work
    def encode_prompt(self, clip: Clip, clip_text: str, t5_text: str | None = None, guidance: float | None = None,
                      t5_length: int | None = None) -> Conditioning:
        encoders = clip.encoders
        tokens = encoders.tokenize(clip_text, t5_text, t5_length=t5_length)
        need = max(activations.text_bytes(encoders.t5.spec, len(tokens.t5), clip.dtype.itemsize),
                   activations.clip_bytes(encoders.clip.spec, clip.dtype.itemsize))
        models = [self._resident(encoders.t5, "t5", clip.dtype), self._resident(encoders.clip, "clip_l", clip.dtype)]
        need += sum(lora.nbytes(clip.loras, role, module, clip.dtype)
                    for role, module in zip(TEXT_ROLES, (encoders.clip, encoders.t5), strict=True))
        place = torch.device("cpu") if clip.on_cpu else self.device
        moves = self.residence.moves and not clip.on_cpu
        with (self.residence.running("encode", models, need, on_cpu=clip.on_cpu),
              lora.carrying_text(clip, moves=moves, device=place)):
            cond, pooled = (states.cpu() for states in encoders.encode_tokens(tokens))
        values: dict[str, Any] = {"pooled_output": pooled}
        if guidance is not None:
            values["guidance"] = guidance
        return [[cond, values]]

    def empty_latent(self, width: int, height: int, batch: int = 1, *, channels: int = FLUX_AE.z_channels) -> Latent:
        """LATENT of zeros, each side of the picture divided by 8 and rounded down, as core's nodes do; that is told."""
        w, h = width // FLUX_AE.downscale, height // FLUX_AE.downscale
        check_latent_size(w, h, batch)
        made = w * FLUX_AE.downscale, h * FLUX_AE.downscale
        if made != (width, height):
            log.warning("a picture of %d x %d becomes %d x %d: sides are multiples of %d", width, height, *made,
                        FLUX_AE.downscale)
        return {"samples": torch.zeros(batch, channels, h, w)}

    def sample(self, model: Model, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, seed: int,
               steps: int, cfg: float = 1.0, solver: str = "euler", schedule: str = "simple", denoise: float = 1.0,
               strength: float = 1.0, shift: float | None = None,
               cfg_window: tuple[float, float] = (0.0, 1.0)) -> Latent:
        if shift is not None:
            model = replace(model, table=sampling.FlowTable(mu=shift, entries=model.table.entries))
        sigmas = schedule_sigmas(model, schedule, steps, solver=solver, denoise=denoise, strength=strength,
                                 latent=latent)
        window = cfg_window_in_sigmas(cfg_window, sigmas)
        guider = Guider(model, positive, negative, cfg, window) if window else Guider(model, positive)
        return self.run_sampler(guider, Noise(seed), solver, sigmas, latent).latent

    def run_sampler(self, guider: Guider, noise: Noise, solver: str, sigmas: Tensor, latent: Latent) -> Sampled:
        """The sampling loop with progress and interrupts. With cfg 1 the negative prompt is not run."""
        model = guider.model
        report = self.progress(max(len(sigmas) - 1, 0))
        last: list[Tensor] = []

        def on_step(step: int, total: int, denoised: Tensor, x: Tensor) -> None:
            last[:] = [denoised]
            report(step + 1, self._preview(denoised) if self._previews else None)

        start = checked_samples(latent)
        batch, _, height, width = start.shape
        text = max((len(entry[0][0]) + sampling.reference_tokens(entry[1])
                    for entry in (*guider.positive, *(guider.negative or []))), default=0)
        need = activations.sample_bytes(model.flux.spec, 8 * width, 8 * height, batch, text, self.dtype.itemsize)
        need += lora.nbytes(model.loras, "transformer", model.flux, self.dtype)
        lora.check_pictures(model, guider.positive, guider.negative)
        resident = self._resident(model.flux, "transformer", self.dtype)
        with (self.residence.running("sample", [resident], need),
              lora.carrying(model.flux, "transformer", model.loras, mode=model.lora_mode, moves=self.residence.moves,
                            dtype=self.dtype, device=self.device, mu=model.table.mu) as carried):
            denoiser = Denoiser(model.flux, guider.positive, guider.negative, guider.cfg, guider.cfg_window,
                                dtype=self.dtype, table=model.table)
            samples = sampling.sample(
                lora.stepped(denoiser, carried, model.loras, start), start, sigmas, seed=noise.seed or 0,
                noise=noise.draw(latent), add_noise=noise.seed is not None, solver=solver,
                noise_mask=latent.get("noise_mask"), mask_at=model.mask_at(sigmas), callback=on_step,
                device=self.device)
            last = [denoised.cpu() for denoised in last]
        done = {**latent, "samples": samples}
        clean = {**latent, "samples": process_out(last[0].float())} if last else done
        return Sampled(done, clean)

    @torch.no_grad()
    def _preview(self, denoised: Tensor) -> Image.Image:
        """A picture of an eighth of the size from model latents, in the colours of the autoencoder loaded last.

        The map from latents to colours is fitted to that autoencoder's own answer to noise, once; with none loaded the
        colours are false.
        """
        autoencoders = [module for module in self._loaded.values() if isinstance(module, Autoencoder)]
        if autoencoders and (self._preview_factors is None or self._preview_factors[0] is not autoencoders[-1]):
            autoencoder = autoencoders[-1]
            weights = next(autoencoder.parameters())
            probe = torch.randn((8, FLUX_AE.z_channels, 8, 8), generator=torch.Generator().manual_seed(0))
            probe = torch.nn.functional.interpolate(probe[..., :2, :2], size=(8, 8))  # flat areas, as pictures have
            pictures = autoencoder.decode(process_out(probe).to(weights.device, weights.dtype))
            self._preview_factors = autoencoder, sampling.fit_preview_factors(probe, pictures)
        factors = self._preview_factors[1] if self._preview_factors else None
        return Image.fromarray(sampling.latent_preview(denoised, factors).numpy())

    @torch.no_grad()
    def decode(self, vae: Vae, latent: Latent, *, tile_size: int | None = None) -> Tensor:
        """IMAGE. In strips of `tile_size` rows of pixels if given, and above 2 megapixels, where the memory for a whole
        picture counts more than the quarter of time that strips cost; the picture is the same."""
        samples = checked_samples(latent)
        channels = vae.autoencoder.spec.z_channels
        if samples.shape[1] != channels:
            raise BadInput(f"this latent has {samples.shape[1]} channels, {vae.path.name} decodes {channels}")
        spec, size = vae.autoencoder.spec, (8 * samples.shape[-1], 8 * samples.shape[-2])
        resident = self._resident(vae.autoencoder, "vae", self._wide_dtype)
        strips = activations.strip_bytes(spec, *size, resident.dtype.itemsize, tile_size or ROWS)
        tiled = tile_size is not None or samples.shape[-1] * samples.shape[-2] > TILED_FROM
        whole = strips if tiled else activations.decode_bytes(spec, *size, resident.dtype.itemsize)
        pictures = []
        with self.residence.running("decode", [resident], whole, strips) as short:
            weights = next(vae.autoencoder.parameters())
            for item in samples.split(1):  # one at a time: memory stays that of one picture
                self.check_interrupt()
                resident.watch.check()
                z = item.to(weights.device, weights.dtype)
                decoded = (decode_tiled(vae.autoencoder, z, rows=tile_size or ROWS) if tiled or short
                           else vae.autoencoder.decode(z))
                pixels = decoded.float().cpu()
                pictures.append(((pixels + 1) / 2).clamp(0, 1).movedim(1, -1))  # (1, H, W, 3)
        image = torch.cat(pictures)
        if not torch.isfinite(image).all():
            raise NotFinite(f"{vae.path.name} decoded to NaN or infinity; nothing was saved. Check the file, or use "
                            "--dtype fp32")
        return image

    @torch.no_grad()
    def encode(self, vae: Vae, image: Tensor, *, mask: Tensor | None = None) -> Latent:
        """LATENT. With `mask` (B, H, W), 1 = repaint, it goes into `noise_mask`."""
        if image.ndim != 4 or image.shape[-1] < 3 or min(image.shape[1:3]) < vae.autoencoder.spec.downscale:
            raise BadInput("a picture must be (batch, height, width, 3) and at least 8 x 8, found "
                           f"{tuple(image.shape)}")
        grid = vae.autoencoder.spec.downscale
        height, width = (side // grid * grid for side in image.shape[1:3])
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        pixels = image[:, top:top + height, left:left + width, :3].movedim(-1, 1) * 2 - 1  # (B, 3, H, W)
        resident = self._resident(vae.autoencoder, "vae", self._wide_dtype)
        need = activations.encode_bytes(vae.autoencoder.spec, width, height, resident.dtype.itemsize)
        with self.residence.running("encode picture", [resident], need):
            weights = next(vae.autoencoder.parameters())
            items = [vae.autoencoder.encode(item.to(weights.device, weights.dtype)).float().cpu()
                     for item in pixels.split(1)]
        latent: Latent = {"samples": torch.cat(items)}
        if mask is not None:
            cut = mask[..., top:top + height, left:left + width] if mask.shape[-2:] == image.shape[1:3] else mask
            latent["noise_mask"] = cut.reshape(-1, 1, *cut.shape[-2:])
        return latent

    @torch.no_grad()
    def see(self, clip_vision: ClipVision, image: Tensor, *, crop: bool = False) -> Tensor:
        """One picture at a time: memory stays that of one."""
        vision = clip_vision.vision
        check_pictures(image, vision.spec.image_size, crop)
        resident = self._resident(vision, "vision", self._wide_dtype)
        states = []
        with self.residence.running("see", [resident],
                                    activations.vision_bytes(vision.spec, resident.dtype.itemsize)):
            weights = next(vision.parameters())
            for item in image.split(1):
                self.check_interrupt()
                pixels = to_pixels(item.float().cpu(), vision.spec, crop)  # MPS cannot resize so before torch 2.8
                states.append(vision(pixels.to(weights.device, weights.dtype)).float().cpu())
        seen = torch.cat(states)
        if not torch.isfinite(seen).all():
            raise NotFinite(f"{clip_vision.path.name} gave NaN or infinity for this picture. Check the file, or use "
                            "--dtype fp32")
        return seen

    def nearness(self, folder: Path, image: Tensor, resolution: int) -> Tensor:
        return depth.nearness(folder, image, resolution, self.device,
                              lambda count: self.residence.running("depth map", [], count))

    @torch.no_grad()
    def style_tokens(self, style_model: StyleModel, states: Tensor) -> Tensor:
        resident = self._resident(style_model.redux, "redux", self._wide_dtype)
        need = 4 * resident.dtype.itemsize * states.shape[:-1].numel() * style_model.redux.spec.hidden_size
        with self.residence.running("style", [resident], need):
            weights = next(style_model.redux.parameters())
            tokens: Tensor = style_model.redux(states.to(weights.device, weights.dtype)).float().cpu()
        if not torch.isfinite(tokens).all():
            raise NotFinite(f"{style_model.path.name} gave NaN or infinity. Check the file, or use --dtype fp32")
        return tokens

    def save_images(self, images: Tensor, prefix: str, metadata: Metadata | None = None, *,
                    temporary: bool = False) -> list[dict[str, str]]:
        """PNG files of an IMAGE. `temporary`: into the temp folder, for previews."""
        if self._save_to is not None and not temporary:
            paths = [self._save_to(len(self.saved) + i) for i in range(len(images))]
            if not torch.isfinite(images).all():  # before the first is written
                raise NotFinite("the picture holds NaN or infinity; nothing was saved")
            for image, path in zip(images, paths, strict=True):
                save_png(image, path, metadata)
            self.saved += paths
            return [{"filename": path.name, "subfolder": "", "type": "output"} for path in paths]
        kind, root = "output", self.folders.output
        if temporary and self.folders.temp is not None:
            kind, root = "temp", self.folders.temp
        saved = save_numbered(images, root, prefix, metadata, kind)
        self.saved += [root / entry["subfolder"] / entry["filename"] for entry in saved]
        return saved

    # -- running
    def progress(self, total: int) -> Progress:
        bar = self._progress_bar(total) if self._progress_bar is not None else None

        def report(value: int, preview: Any = None) -> None:
            self.check_interrupt()
            if bar is not None:
                bar(value, preview)

        return report

    def show(self, text: str) -> None:
        """As warnings, which are what a command line shows."""
        for line in text.splitlines():
            log.warning("%s", line)

    def interrupt(self) -> None:
        """Ask the run to stop at its next step; may be called from another thread or a signal handler."""
        self._interrupt.set()

    def check_interrupt(self) -> None:
        if self._interrupt.is_set():
            self._interrupt.clear()
            raise Interrupted("stopped by the user; nothing was saved")


def here() -> StandaloneHost:
    """The host in use, for nodes that exist in the standalone host only."""
    host = current()
    if not isinstance(host, StandaloneHost):
        raise FluxKitError(f"this node belongs to the standalone host, but the host in use is {host.name}")
    return host
