"""The port: what nodes and the command line may ask of the program they run in.

A host is chosen explicitly, once, at start-up (`use`). It is never found by trying an import: with a ComfyUI checkout
on sys.path such an import succeeds in a process that has nothing to do with ComfyUI, and loads half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.errors import FluxKitError

if TYPE_CHECKING:
    import torch

    from ..engine.adapters import Row, Share
    from ..engine.models.autoencoder import Autoencoder
    from ..engine.models.flux import Flux
    from ..engine.models.vision import Redux, SiglipVision
    from ..engine.text import TextEncoders

Conditioning = list[list[Any]]  # [[cond (1, L, d_model), {"pooled_output": (1, hidden), "guidance": float, ...}], ...]
Latent = dict[str, Any]  # {"samples": (B, 16, H/8, W/8) fp32, "noise_mask"?: (B, 1, h, w), "batch_index"?: list[int]}
Metadata = Mapping[str, Any]  # PNG text keys to JSON values: "prompt" (API format), "workflow" (UI format)


class Progress(Protocol):
    """Reports `value` of the total steps done; `preview` is a PIL image or None. Interrupted if the user stopped."""

    def __call__(self, value: int, preview: Any = None) -> None: ...


class Host(Protocol):
    """CONDITIONING, LATENT, IMAGE (B, H, W, 3) fp32 0..1 and MASK (B, H, W) fp32 0..1 are ComfyUI's plain data in
    every host; MODEL, CLIP, VAE, CLIP_VISION and STYLE_MODEL are the host's own: made with `wrap_*` and handed back,
    never looked into."""

    name: str
    """"standalone" or "comfyui"."""

    @property
    def io(self) -> Any:
        """The namespace nodes are declared with: ComfyNode, Schema, NodeOutput, Hidden, FolderType, Int, Float, String,
        Boolean, Combo, Image, Mask, Latent, Conditioning, Model, Clip, Vae, ClipVision, StyleModel, Sigmas ..., as
        `comfy_api.latest.io`."""

    # -- files
    def list_files(self, kind: str) -> list[str]:
        """Names relative to the folders of a kind ("diffusion_models", "text_encoders", "vae", "loras", "clip_vision",
        "style_models", "checkpoints"; also "input", and "depth", folders of depth models), slashes forward, sorted."""

    def resolve_file(self, kind: str, name: str) -> Path:
        """The file a workflow means by `name`: exact, else the only file of that base name under the kind's folders
        although slashes, case or subfolder differ (what was taken is logged). None or several: MissingFile with near
        matches. Kind "input" is the input folder, exact names only. Nothing outside the folders is ever returned."""

    def new_file(self, kind: str, name: str) -> Path:
        """Where a model file that is to be made goes: `name` below the first folder of its kind. BadInput for a name
        that leaves it, or where there is no such folder; nothing is made."""

    # -- objects
    def load_model(self, path: Path) -> Any:
        """MODEL of the transformer in a file, alone or part of an all-in-one. BadModelFile says what the file is."""

    def load_text_encoders(self, paths: Sequence[Path]) -> Any:
        """CLIP from files that together hold CLIP-L and T5, in any order (one all-in-one file is enough)."""

    def load_vae(self, path: Path) -> Any:
        """VAE of the autoencoder in a file."""

    def load_clip_vision(self, path: Path) -> Any:
        """CLIP_VISION of the SigLIP vision encoder in a file."""

    def load_style_model(self, path: Path) -> Any:
        """STYLE_MODEL of the Redux projector in a file."""

    def wrap_model(self, flux: Flux, path: str | Path) -> Any:
        """MODEL from an engine transformer; `path` is the file it came from (for messages and metadata)."""

    def wrap_clip(self, text_encoders: TextEncoders, path: str | Path) -> Any:
        """CLIP from the two engine text encoders with their tokenizers."""

    def wrap_vae(self, autoencoder: Autoencoder, path: str | Path) -> Any:
        """VAE from an engine autoencoder."""

    def wrap_clip_vision(self, vision: SiglipVision, path: str | Path) -> Any:
        """CLIP_VISION from an engine vision encoder."""

    def wrap_style_model(self, redux: Redux, path: str | Path) -> Any:
        """STYLE_MODEL from an engine Redux projector."""

    def img_in_width(self, model: Any) -> int | None:
        """Channels of a token that the transformer of MODEL takes: 64 dev and schnell, 128 Depth and Canny, 384 Fill.
        A control LoRA that will widen its `img_in` counts already. None: MODEL does not tell. BadInput: not FLUX.1."""

    def embeds_guidance(self, model: Any) -> bool | None:
        """Whether the transformer of MODEL was distilled with guidance; False: schnell, whose steps are not shifted.
        None: it is no FLUX.1."""

    def with_shift(self, model: Any, mu: float) -> Any:
        """A clone of MODEL, a FLUX.1, whose schedules are shifted by `mu`; what is given stays as it is."""

    def drops_control(self, model: Any) -> bool:
        """Whether this host may not see that a control LoRA widens MODEL's `img_in`, where weights are not loaded
        whole, and leave out the map of a conditioning: it then needs `noise_concat` beside `concat_latent_image`."""

    # -- LoRAs
    def with_loras(self, model: Any, clip: Any | None, rows: Sequence[Row], *, mode: str = "auto", strict: bool = True
                   ) -> tuple[Any, Any | None, str]:
        """MODEL and CLIP with these LoRAs beside those they carry already, and a report on each. What is given stays
        as it is, also where this fails.

        `mode`: "auto", "side" (beside the weights) or "merge" (into them where they can be). `strict`: raises where a
        file cannot be applied as it is (BadModelFile, BadInput, NotFinite, MissingFile); otherwise it, or its broken
        layers, are left out and the report says so. A row that is off or 0 reads nothing.
        """

    def lora_share(self, model: Any, path: Path) -> Share:
        """How much a LoRA file changes the transformer of MODEL, whose weights are read once."""

    # -- work
    def encode_prompt(self, clip: Any, clip_text: str, t5_text: str | None = None, guidance: float | None = None,
                      t5_length: int | None = None) -> Conditioning:
        """CONDITIONING of a prompt. `t5_text` None: the same as `clip_text`. `guidance` None: no key, which samplers
        read as 3.5. `t5_length` None: at least 256 tokens and never cut, as core does; else exactly that many."""

    def empty_latent(self, width: int, height: int, batch: int = 1) -> Latent:
        """LATENT of zeros for pictures of `width` x `height` pixels."""

    def sample(self, model: Any, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, seed: int,
               steps: int, cfg: float = 1.0, solver: str = "euler", schedule: str = "simple", denoise: float = 1.0,
               strength: float = 1.0, shift: float | None = None,
               cfg_window: tuple[float, float] = (0.0, 1.0)) -> Latent:
        """A LATENT (new dict, keys other than "samples" kept) from noise of `seed` (0 .. 2**64-1) over `latent`.

        `negative` None or cfg 1.0: one pass a step. `solver` and `schedule` are names of the engine's tables SOLVERS
        and SCHEDULES. `denoise` 0..1 as KSampler: total = int(steps/denoise), last steps+1 sigmas; `strength` 0..1 as
        diffusers: the last share of `steps` steps. `shift` None: the model's own; else mu of the time shift.
        `cfg_window`: CFG only where start <= share of steps done < end. Reports progress and checks for interrupts
        each step. BadInput, NotFinite, Interrupted.
        """

    def decode(self, vae: Any, latent: Latent) -> torch.Tensor:
        """IMAGE (B, H, W, 3) fp32 0..1 of a LATENT."""

    def encode(self, vae: Any, image: torch.Tensor, *, mask: torch.Tensor | None = None) -> Latent:
        """LATENT of an IMAGE; sides are cut to multiples of 8 about the centre, as core does. With `mask` (B, H, W),
        1 = repaint, it becomes `noise_mask`."""

    def see(self, clip_vision: Any, image: torch.Tensor, *, crop: bool = False) -> torch.Tensor:
        """Last states (B, L, width) fp32 of an IMAGE, one row of tokens a picture. `crop`: the middle square, as core's
        node does by default; else the whole picture, stretched, as BFL does. BadInput, NotFinite."""

    def nearness(self, folder: Path, image: torch.Tensor, resolution: int) -> torch.Tensor:
        """How near each pixel of an IMAGE is by a depth model of kind "depth", near large: (B, H, W) fp32.
        `resolution`: 518 is each model's own size. FluxKitError without transformers, MissingFile, BadModelFile,
        NotFinite."""

    def style_tokens(self, style_model: Any, states: torch.Tensor) -> torch.Tensor:
        """Text tokens (B, L, d_model) fp32 of states that `see` gave. BadInput if they are of another width."""

    def save_images(self, images: torch.Tensor, prefix: str, metadata: Metadata | None = None) -> list[dict[str, str]]:
        """Writes PNGs `<prefix>_00001_.png` ... under the output folder, never over a file; -> [{"filename",
        "subfolder", "type": "output"}]. `metadata` is embedded as ComfyUI does ({"prompt": ..., "workflow": ...}).
        NotFinite: nothing is written."""

    # -- running
    def progress(self, total: int) -> Progress:
        """A callable to report steps of the node that runs now."""

    def check_interrupt(self) -> None:
        """Raises Interrupted if the user asked to stop. Call it in long loops."""

    def show(self, text: str) -> None:
        """Shows a text, of several lines perhaps, with the node that runs now."""

    # -- where and how models run
    @property
    def device(self) -> torch.device:
        """Where models compute."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the transformer: bf16 where the device has it, else fp16, else fp32; the user may choose."""

    @property
    def memory(self) -> str:
        """"auto", "full", "stream" or "cpu"."""


_current: Host | None = None


def use(host: Host) -> None:
    """Make `host` the one that nodes ask. Call it before importing `nodes`, whose classes are built from `host.io`."""
    global _current
    _current = host


def current() -> Host:
    """The host in use; FluxKitError if none was chosen."""
    if _current is None:
        raise FluxKitError("no host was chosen: call hosts.use(...) before importing nodes or running them")
    return _current
