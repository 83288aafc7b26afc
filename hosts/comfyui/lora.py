"""LoRAs inside ComfyUI, in files of every dialect, on MODELs and CLIPs of any loader that holds FLUX.1.

What stays the same over a run goes through the host's own `add_patches`: plain pairs as its LoRAAdapter, anything else
as an adapter of ours, so that its merging, low-VRAM rule, unloading and saving apply, and on packed weights the side
path of `hanging`. What differs between steps or tokens, and all of it where the user asks for the side path, hangs
beside the layers while the host samples, put there and taken off by wrappers that travel with the MODEL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import comfy.weight_adapter
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...engine.adapters import Adapter, Applied, Attachment, Lora, Row, Share, attach, norm_share
from ...engine.adapters import layers as layer_facts
from ...engine.adapters.adapter import swapped
from ...engine.adapters.attach import SIDE, Job, fitting
from ...engine.adapters.costs import side_bytes
from ...engine.errors import BadInput
from .. import loras
from ..loras import Chosen
from .control import WideLoaded
from .hanging import HostAdapter, sides
from .layers import InUse
from .packed import packed_layers
from .sampling import require_flux, table_of

KEY = "flux_kit_loras"
PREFIX = {"transformer": "diffusion_model.", "clip_l": "clip_l.transformer.", "t5": "t5xxl.transformer."}
ROUNDED = "merging into 8-bit weights loses a part of it; choose 'side path', which loses nothing"
MERGES = "by the host (merged where loaded, put on at each use where offloaded)"
AT_USE = "unpacked and changed at each use"
PATCH = 2


def patch_of(adapter: Adapter, layer: Any) -> Any:
    """An adapter as the host's own LoRA where it is a plain pair, else as ours."""
    width = adapter.size[1]
    if adapter.algorithm != "LoRA" or {"magnitude", "mid"} & set(adapter.factors) or adapter.on_bias:
        return HostAdapter(set(adapter.keys), (adapter,))
    up, down = (adapter.factors[role].flatten(1) for role in ("up", "down"))
    up = swapped(up) if adapter.destination.swapped else up
    size, reshape = layer_facts.size_of(layer), None
    if width is not None and width < size[1]:
        down = torch.nn.functional.pad(down, (0, size[1] - width))
    elif width is not None and width > size[1]:
        reshape = [size[0], width]
    alpha = adapter.scale * down.shape[0]
    return comfy.weight_adapter.LoRAAdapter(set(adapter.keys), (up, down, alpha, None, None, reshape))


def key_of(adapter: Adapter, layer: Any, prefix: str) -> Any:
    """The host's key of what an adapter changes: the parameter's name, with the rows where it is not all of them."""
    module = adapter.destination.module
    name = f"{prefix}{module}.{'bias' if adapter.on_bias else layer_facts.weight_name(layer)}"
    size = layer_facts.size_of(layer)
    rows = adapter.destination.rows(size)
    return name if (rows.start, rows.stop) == (0, size[0]) else (name, (0, rows.start, rows.stop - rows.start))


def put_on(patcher: Any, module: nn.Module, role: str, acting: Sequence[Chosen], jobs: Mapping[str, list[Job]]
           ) -> None:
    """Patches of the rows: few calls, since each call of the host goes through all weights, and for every weight those
    of a later row after those of an earlier one."""
    entries = [one.entry(role) for one in acting]
    calls: list[tuple[float, dict[Any, Any]]] = []
    latest: dict[str, int] = {}
    for name, todo in jobs.items():
        layer = layer_facts.layer_of(module, name)
        for number, adapter in todo:
            factor = entries[number].factor
            strength = entries[number].strength * (1.0 if factor is None else factor(name))
            if not strength:
                continue
            key = key_of(adapter, layer, PREFIX[role])
            weight = key if isinstance(key, str) else key[0]
            call = next((i for i in range(latest.get(weight, 0), len(calls))
                         if calls[i][0] == strength and key not in calls[i][1]), len(calls))
            if call == len(calls):
                calls.append((strength, {}))
            calls[call][1][key] = patch_of(adapter, layer)
            latest[weight] = call
    for strength, patches in calls:
        missed = set(patches) - set(patcher.add_patches(patches, strength))
        if missed:
            raise BadInput(f"ComfyUI has no weight {missed.pop()} in this model to put a LoRA on. Load the model with "
                           "Load Flux, or take the LoRA out")


def ways(module: nn.Module, jobs: Mapping[str, list[Job]], applied: Sequence[Applied]) -> None:
    """Notes how the layers of each row are changed by the host."""
    packed = packed_layers(module)
    for name, todo in jobs.items():
        layer = layer_facts.layer_of(module, name)
        on_weight = [adapter for _, adapter in todo if not adapter.on_bias]
        how = MERGES if name not in packed else SIDE if sides(on_weight) else AT_USE
        for number in {number for number, _ in todo}:
            applied[number].layers[how] += 1
            if how == MERGES and is_rounded(layer) and ROUNDED not in applied[number].notes:
                applied[number].notes.append(ROUNDED)


def is_rounded(layer: Any) -> bool:
    """Whether the host stores the weight with fewer than 16 bits."""
    weight = layer_facts.weight_of(layer)
    return weight.dtype not in layer_facts.PLAIN_DTYPES or type(weight).__name__ == "QuantizedTensor"


@dataclass(frozen=True)
class Room:
    """What the host asks of a control before it loads models. Here there is nothing to load, but the bytes are used."""

    nbytes: int

    def get_models(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return self.nbytes


class Runs:
    """Rows that hang beside the layers of a MODEL while the host samples with it: a wrapper of the sampler, which puts
    them on and takes them off, and of each pass, which moves them to its step and its size."""

    def __init__(self, chosen: tuple[Chosen, ...]) -> None:
        self.chosen = chosen
        self.attached: Attachment | None = None
        self._size: tuple[int, ...] | None = None

    def sample(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        base = guider.inner_model
        acting = [one for one in self.chosen if one.acts_on("transformer")]
        if self.attached is not None or not acting:
            return executor(guider, *args, **kwargs)
        dtype = getattr(base, "manual_cast_dtype", None) or base.get_dtype()
        # nodes behind Apply LoRAs may have shifted the times
        mu = table_of(base.current_patcher).mu if any(one.row.timed for one in acting) else None
        weights = InUse()
        self.attached = attach(base.diffusion_model, [one.entry("transformer", mu) for one in acting], mode="side",
                               dtype=dtype, device=base.current_patcher.load_device, skip_broken=True,
                               source=weights.source)
        weights.forget()
        try:
            return executor(guider, *args, **kwargs)
        finally:
            self.attached.detach()
            self.attached, self._size = None, None

    def prepare(self, executor: Any, patcher: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        """The host makes room for a control by what it says it takes; so do these, until the weights are loaded."""
        if patcher.additional_models.get("multigpu"):
            return executor(patcher, noise_shape, conds, *args, **kwargs)
        dtype = getattr(patcher.model, "manual_cast_dtype", None) or patcher.model.get_dtype()
        adapters = [adapter for one in self.chosen if one.acts_on("transformer")
                    for adapter in one.lora.of("transformer")]
        room = Room(side_bytes(patcher.model.diffusion_model, adapters, dtype.itemsize))
        loaded, _, models = executor(patcher, noise_shape, {**conds, KEY: [{"control": room}]}, *args, **kwargs)
        return loaded, conds, models

    def step(self, executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.attached is not None:
            acting = [one for one in self.chosen if one.acts_on("transformer")]
            size = (-(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH), context.shape[1])
            if size != self._size and any(one.row.region for one in acting):
                self.attached.set_mask(loras.mask_of(acting, *size))
                self._size = size
            if any(one.row.timed for one in acting):
                self.attached.set_sigma(float(timestep.flatten()[0]))
        return executor(x, timestep, context, *args, **kwargs)


class ControlCheck:
    """A wrapper of the whole run. Control LoRAs want a map, which the host replaces by zeros in silence; and it gives a
    map only to an `img_in` that is wide already, which one that is not loaded, or has its LoRA beside it, is not. Here
    every prompt gets its map as channels by the key that the host asks nothing for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider, noise = executor.class_obj, args[0] if args else kwargs["noise"]
        for name, conditioning in guider.conds.items():
            if not all("concat_latent_image" in entry for entry in conditioning):
                raise loras.needs_picture(self.names)
            guider.conds[name] = [{**entry, "noise_concat": channels_of(entry["concat_latent_image"], noise,
                                                                        guider.model_patcher)}
                                  for entry in conditioning]
        return executor(*args, **kwargs)


def channels_of(latents: Tensor, noise: Tensor, patcher: Any) -> Tensor:
    """An encoded map as the host makes channels of it for a model that is wide."""
    fitted = comfy.utils.common_upscale(latents, noise.shape[-1], noise.shape[-2], "bilinear", "center")
    channels: Tensor = patcher.model.process_latent_in(comfy.utils.resize_to_batch_size(fitted, noise.shape[0]))
    return channels


def wrapped(patcher: Any, kind: str) -> Any:
    """The wrapper of ours that a MODEL carries already, else None."""
    found = patcher.get_wrappers(kind, KEY)
    return found[0] if found else None


def set_wrapper(patcher: Any, kind: str, wrapper: Callable[..., Any]) -> None:
    patcher.remove_wrappers_with_key(kind, KEY)
    patcher.add_wrapper_with_key(kind, KEY, wrapper)


IMG_IN = ("img_in", "model.x_embedder")
"""Where transformers have the layer that takes the image tokens: the host's and ours, diffusers' inside a wrapper."""


def img_in_width(model: Any) -> int | None:
    """`hosts.Host.img_in_width`. By the patches that wait on the layer, not by its weight: that may carry those of
    another clone just now."""
    require_flux(model)
    layers = (layer_facts.layer_of(model.model.diffusion_model, name) for name in IMG_IN)
    layer = next((layer for layer in layers if layer is not None), None)
    if layer is None:
        return None
    runs = wrapped(model, WrappersMP.SAMPLER_SAMPLE)
    pending = [width_after(entry[1]) for entry in model.patches.get(f"{PREFIX['transformer']}img_in.weight", ())]
    return max([loras.input_width(runs.__self__.chosen if runs else (), layer_facts.size_of(layer)[1]), *pending])


def drops_control(model: Any) -> bool:
    """`hosts.Host.drops_control`. Our patchers keep a widened `img_in` loaded, and our own loader of LoRAs hands maps
    over by itself (`ControlCheck`)."""
    require_flux(model)
    if isinstance(model, WideLoaded) or wrapped(model, WrappersMP.OUTER_SAMPLE) is not None:
        return False
    layer = layer_facts.layer_of(model.model.diffusion_model, IMG_IN[0])
    return layer is not None and (img_in_width(model) or 0) > layer_facts.size_of(layer)[1]


def width_after(patch: Any) -> int:
    """Columns that a weight has with one of the host's patches on it, 0 if the patch leaves them as they are."""
    if isinstance(patch, HostAdapter):
        return patch.weights[0].size[1] or 0
    if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        shape = patch.weights[5]
        return 0 if shape is None else int(shape[1])
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 2:
        values, settings = patch[1]
        return int(values.shape[1]) if settings["pad_weight"] else 0
    return 0


def with_loras(model: Any, clip: Any, rows: Sequence[Row], *, mode: str, strict: bool, resolve: Callable[[str], Path]
               ) -> tuple[Any, Any, str]:
    """`hosts.Host.with_loras`."""
    if mode not in ("auto", "side", "merge"):
        raise BadInput(f"mode '{mode}' is not one of auto, side, merge")
    require_flux(model)
    if clip is not None and any(encoder_of(clip, role) is None for role in loras.TEXT_ROLES):
        stage = type(getattr(clip, "cond_stage_model", clip)).__name__
        raise BadInput(f"this CLIP is of another model ({stage}), FLUX.1 needs CLIP-L "
                       "and T5; load both with Load Text Encoders, or with type 'flux'")
    chosen, lines = loras.choose(resolve, rows, strict)
    made, told = _with_model(model, [one for one in chosen if one.acts_on("transformer")], mode, not strict)
    lines += told
    if clip is None:
        lines += loras.unconnected(chosen)
    else:
        clip, told = _with_clip(clip, chosen, not strict)
        lines += told
    return made, clip, "\n".join(lines)


def _with_model(model: Any, acting: list[Chosen], mode: str, skip_broken: bool) -> tuple[Any, list[str]]:
    flux = model.model.diffusion_model
    beside = [one for one in acting if one.row.varies or mode == "side"]
    if mode == "merge" and any(one.row.varies for one in acting):
        raise BadInput("a LoRA with a range, schedule or region cannot be merged. Choose 'auto', or take these off")
    inside = [one for one in acting if one not in beside]
    made, lines = model.clone(), []
    jobs, applied = _fitted(flux, inside, "transformer", skip_broken)
    ways(flux, jobs, applied)
    put_on(made, flux, "transformer", inside, jobs)
    lines += loras.told(inside, applied, "transformer")
    if beside:
        jobs, applied = _fitted(flux, beside, "transformer", skip_broken)
        for todo in jobs.values():
            for number in {number for number, _ in todo}:
                applied[number].layers[SIDE] += 1
        lines += loras.told(beside, applied, "transformer")
        before = wrapped(made, WrappersMP.SAMPLER_SAMPLE)
        runs = Runs((*(before.__self__.chosen if before else ()), *beside))
        set_wrapper(made, WrappersMP.SAMPLER_SAMPLE, runs.sample)
        set_wrapper(made, WrappersMP.DIFFUSION_MODEL, runs.step)
        set_wrapper(made, WrappersMP.PREPARE_SAMPLING, runs.prepare)
    names = loras.control_loras(acting, flux.img_in.in_features)
    if names:
        earlier = wrapped(made, WrappersMP.OUTER_SAMPLE)
        set_wrapper(made, WrappersMP.OUTER_SAMPLE, ControlCheck((*(earlier.names if earlier else ()), *names)))
        lines += [f"{name} needs its control picture in the conditioning" for name in names]
    return made, lines


def encoder_of(clip: Any, role: str) -> Any:
    """The network of a CLIP for this role, None if it has none."""
    found = getattr(clip, "cond_stage_model", None)
    for name in PREFIX[role].rstrip(".").split("."):
        found = getattr(found, name, None)
    return found


def _with_clip(clip: Any, chosen: Sequence[Chosen], skip_broken: bool) -> tuple[Any, list[str]]:
    made, lines = clip.clone(), []
    for role in loras.TEXT_ROLES:
        acting = [one for one in chosen if one.acts_on(role)]
        module = encoder_of(clip, role)
        jobs, applied = _fitted(module, acting, role, skip_broken)
        ways(module, jobs, applied)
        put_on(made.patcher, module, role, acting, jobs)
        lines += loras.told(acting, applied, role)
    return made, lines


def _fitted(module: nn.Module, acting: Sequence[Chosen], role: str, skip_broken: bool
            ) -> tuple[dict[str, list[Job]], list[Applied]]:
    """Adapters by layer, once each is known to fit."""
    applied = [Applied(one.lora.path.name) for one in acting]
    return fitting(module, [one.entry(role) for one in acting], role, applied, skip_broken), applied


def share(model: Any, lora: Lora) -> Share:
    """`hosts.Host.lora_share`."""
    require_flux(model)
    return norm_share(model.model.diffusion_model, lora, source=InUse().source)
