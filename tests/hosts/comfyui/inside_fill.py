"""Checks of inside.py: what FluxKitFill writes and how the host's own model and sampler take it, and the width of
`img_in` of MODELs of every kind. Imported by it, in its process."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import torch
from inside import (
    ENGINE,
    ERRORS,
    HOST,
    MODEL,
    NAME,
    check,
    conditioning,
    core_patcher,
    loras,
    our_sampler,
    patched,
    random,
    relative,
    sampled,
)
from inside_variants import VAE, of, random_file
from safetensors.torch import save_file

NODES = {node.__name__: node for node in sys.modules[NAME + ".nodes"].NODES}
SIZE = (75, 101)
OPTIONS = {"guidance": 30.0, "mask_mode": "official-soft", "noise_mask": "off", "size": "pad"}


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Picture and soft mask of an odd size, the same in every process."""
    draw = torch.Generator().manual_seed(11)
    return torch.rand(1, *SIZE, 3, generator=draw), torch.linspace(0, 1, SIZE[1]).expand(1, *SIZE).contiguous()


@check
def fill_node() -> Any:
    """The tensors go into a file, where the test compares them with the standalone host's."""
    vae, prompt, (picture, mask) = HOST.load_vae(VAE), conditioning(), case()
    ours = HOST.load_model(random_file("fill-node", in_channels=384))
    twin = core_patcher(ours)
    positive, negative, latent, report = of(NODES["FluxKitFill"].execute(prompt, vae, picture, mask, model=ours,
                                                                         **OPTIONS))
    values = positive[0][1]
    noise = torch.zeros_like(latent["samples"])
    channels = ours.model.concat_cond(noise=noise, device=noise.device, concat_latent_image=values[
        "concat_latent_image"], concat_mask=values["concat_mask"])
    path = Path(tempfile.mkdtemp()) / "fill.safetensors"
    save_file({"picture": values["concat_latent_image"].contiguous(), "mask": values["concat_mask"].contiguous(),
               "latent": latent["samples"].contiguous(), "channels": channels.contiguous()}, path)
    theirs = sampled(twin, positive, negative, latent)
    mine = our_sampler(ours, positive, None, latent)
    decoded = of(NODES["FluxKitDecode"].execute({**latent, "samples": mine}, vae))[0]
    pasted = of(NODES["FluxKitRegionPaste"].execute(picture, vae.decode(theirs), 0.0, True, blend=mask))[0]
    return {"path": str(path), "guidance": values["guidance"], "report": report, "keys": sorted(latent),
            "off": relative(sampled(ours, positive, negative, latent), theirs),
            "our sampler": relative(mine, theirs), "decoded": list(decoded.shape),
            "pasted": list(pasted.shape), "kept": torch.equal(pasted[mask == 0], picture[mask == 0]),
            "changed": relative(pasted, picture)}


@check
def img_in_widths() -> Any:
    """64, 128, 384, and what control LoRAs that wait on a model make of it, by core's loader and by ours."""
    dev, found = HOST.load_model(MODEL), {}
    weights = loras()["bfl control"]
    folder = Path(tempfile.mkdtemp())
    save_file(weights, folder / "width-control.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))
    rows = [sys.modules[ENGINE + ".adapters.stack"].Row("width-control.safetensors", 0.5, 0.5)]
    twin = core_patcher(dev)
    for name, model in {
            "dev": dev, "core's dev": twin, "core's loader": patched(dev, weights),
            "core's loader on core's": patched(twin, weights), "ours": HOST.with_loras(dev, None, rows)[0],
            "ours beside": HOST.with_loras(dev, None, rows, mode="side")[0],
            "other lora": patched(dev, loras()["kohya"]), "after them, dev": dev,
            **{variant: HOST.load_model(random_file(f"width-{variant}", in_channels=width))
               for variant, width in (("fill", 384), ("control", 128))}}.items():
        found[name] = HOST.img_in_width(model)
    loaded = patched(twin, weights)
    sampled(loaded, [[cond, {**more, "concat_latent_image": random(1, 16, 12, 16)}] for cond, more in conditioning()])
    found["core's dev, its sister loaded"] = HOST.img_in_width(twin)
    try:
        HOST.img_in_width(SimpleNamespace(model=SimpleNamespace()))
    except ERRORS.BadInput as error:
        found["another model"] = str(error)
    return found
