"""Genuine MODEL and VAE objects of ComfyUI round engine models, which core's nodes and other packs take as their own.

Both are driven by the host's static patcher, which every version has; `wants_dynamic` tells the exception. Where a
MODEL can be moved between kinds of patchers or to another device, the host loads it anew by the factory kept in
`cached_patcher_init`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from torch import nn

from ...engine.models.autoencoder import Autoencoder
from ...engine.models.flux import Flux as EngineFlux
from ...engine.specs import FLUX_AE, FluxSpec
from ...engine.weights import load
from .layers import UNPACKED, adopt, plain_layers
from .modulation import HostTable, ModulationsLast, Patcher, TablePackedPatcher
from .packed import Flux as PackedFlux
from .packed import HostPacked, packed_layers, weight_count
from .transformer import Flux, params_of

log = logging.getLogger(__name__)

FAMILIES = {"dev": "Flux", "schnell": "FluxSchnell", "fill": "FluxInpaint", "control": "Flux"}
"""Variant -> the host's class of configuration, which knows the sampling settings."""


DYNAMIC_SETTING = "FLUX_KIT_DYNAMIC_VRAM"


def wants_dynamic(device: torch.device) -> bool:
    """Whether packed transformers are to be streamed by the dynamic VRAM of newer hosts: only if the environment says
    FLUX_KIT_DYNAMIC_VRAM=1 and the host has it switched on. It has never run on hardware, so nobody gets it unasked."""
    if os.environ.get(DYNAMIC_SETTING) != "1":
        return False
    memory = getattr(comfy, "memory_management", None)
    able = (hasattr(comfy.model_patcher, "ModelPatcherDynamic") and getattr(memory, "aimdo_enabled", False)
            and not comfy.model_management.is_device_cpu(device))
    if not able:
        log.warning("%s=1 has no effect: this ComfyUI has no dynamic VRAM on %s", DYNAMIC_SETTING, device)
    return able


def stored_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that most weights are stored in."""
    count: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        count[parameter.dtype] += parameter.numel()
    return count.most_common(1)[0][0]


def load_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """The MODEL of a transformer file; `disable_dynamic` is the host's wish for its static patcher."""
    flux = load(path, "transformer", dtype=None, packed=HostPacked)
    assert isinstance(flux, EngineFlux)
    return model_patcher(flux, path, disable_dynamic)


def model_patcher(flux: EngineFlux, path: str | Path, disable_dynamic: bool = False) -> Any:
    """MODEL of an engine transformer, in the dtypes that the host (and its command line) chooses for such weights.

    Packed weights stay so, in layers of the host; what they are unpacked to is what it computes in where it may choose.
    """
    config = model_config(flux.spec)
    device = comfy.model_management.get_torch_device()
    supported = list(config.supported_inference_dtypes)
    packed = bool(packed_layers(flux).keys() - set(UNPACKED))
    stored = None if packed else stored_dtype(flux)
    dtype = comfy.model_management.unet_dtype(device=device, model_params=weight_count(flux), weight_dtype=stored,
                                              supported_dtypes=[*supported, *({stored} - {None, *supported})])
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    with torch.device("meta"):
        ours = Flux(flux.spec, dtype)
    adopt(flux, ours, dtype)
    kind = comfy.model_base.ModelType.FLUX if flux.spec.guidance_embed else comfy.model_base.ModelType.FLOW
    classes = (PackedFlux, TablePackedPatcher) if packed else (comfy.model_base.Flux, Patcher)
    if packed and not disable_dynamic and wants_dynamic(device):
        from . import dynamic  # of what older hosts do not have

        dynamic.make_dynamic(ours, config.manual_cast_dtype or dtype)
        classes = comfy.model_base.Flux, dynamic.DynamicPatcher
    model = classes[0](config, model_type=kind, unet_model=lambda **_: ours)
    if issubclass(classes[1], ModulationsLast):
        HostTable(ours, model)
    patcher = classes[1](
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (load_patcher, (str(path),))
    return patcher


def model_config(spec: FluxSpec) -> Any:
    """The host's description of a FLUX.1 model of these sizes."""
    config = getattr(comfy.supported_models, FAMILIES[spec.variant])({"image_model": "flux", **params_of(spec)})
    config.custom_operations = comfy.ops.manual_cast
    return config


def load_vae(path: str) -> Any:
    """VAE of an autoencoder file, in the dtype the host chooses among those that autoencoders stand."""
    autoencoder = load(path, "vae", dtype=None)
    assert isinstance(autoencoder, Autoencoder)
    return make_vae(autoencoder, path)


def load_vae_patcher(path: str, disable_dynamic: bool = False) -> Any:
    return load_vae(path).patcher


def make_vae(autoencoder: Autoencoder, path: str | Path) -> Any:
    """VAE of an engine autoencoder. The host's class fills in what its version expects; the network is ours."""
    with without_warning("No VAE weights"):
        vae = comfy.sd.VAE(sd={})
    vae.latent_channels = autoencoder.spec.z_channels
    vae.device = comfy.model_management.vae_device()
    vae.vae_dtype = comfy.model_management.vae_dtype(vae.device, vae.working_dtypes)
    vae.output_device = comfy.model_management.intermediate_device()
    with torch.device("meta"):
        vae.first_stage_model = Autoencoder(autoencoder.spec, plain_layers())
    adopt(autoencoder, vae.first_stage_model, vae.vae_dtype)
    archive_dtypes(vae.first_stage_model)
    share = autoencoder.spec.ch / FLUX_AE.ch  # the host's estimates are for the published widths
    vae.memory_used_encode, vae.memory_used_decode = (
        scaled(estimate, share) for estimate in (vae.memory_used_encode, vae.memory_used_decode))
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device())
    vae.patcher.cached_patcher_init = (load_vae_patcher, (str(path),))
    return vae


def scaled(estimate: Callable[..., float], share: float) -> Callable[..., float]:
    return lambda *shape_and_dtype: estimate(*shape_and_dtype) * share


def archive_dtypes(module: nn.Module) -> None:
    """Newer hosts note the dtypes of a new model; BaseModel and CLIP do it for theirs."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(module)


@contextlib.contextmanager
def room_for(device: torch.device, count: int) -> Iterator[None]:
    """So many bytes of the device are free inside, for what is not the host's."""
    comfy.model_management.free_memory(count, device)
    yield
    comfy.model_management.soft_empty_cache()


@contextlib.contextmanager
def without_warning(text: str) -> Iterator[None]:
    """Keeps one of the host's warnings, true of what it was given and none of the user's business, out of its log."""
    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
