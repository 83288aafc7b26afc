"""Control LoRAs on our transformers: the host reads off the weight of `img_in` whether a model takes a map, and widens
that weight only where it is loaded. So a patcher of ours loads a layer that gets wider, however little else fits."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter

from ...engine.errors import BadInput
from ...engine.specs import FLUX_FILL

LAYER = "diffusion_model.img_in"


def widened(entries: Any) -> int:
    """Columns of a weight with the host's patches on it, 0 where they leave them as they are."""
    shapes = [entry[1].weights[5] for entry in entries
              if isinstance(entry[1], comfy.weight_adapter.LoRAAdapter)]
    return max((int(shape[1]) for shape in shapes if shape is not None), default=0)


class WideLoaded:
    """For a static patcher of the host."""

    model: Any
    patches: Any
    load_device: Any

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self._check_width()
        done = super().load(*args, **kwargs)  # type: ignore[misc]
        self._keep_wide(args[0] if args else kwargs.get("device_to"))
        return done

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        freed = super().partially_unload(*args, **kwargs)  # type: ignore[misc]
        self._keep_wide(self.load_device)
        return freed

    def _check_width(self) -> int:
        """Columns that `img_in` is to get, 0 for those it has. BadInput where it has more."""
        width = widened(self.patches.get(f"{LAYER}.weight", ()))
        own = comfy.utils.get_attr(self.model, LAYER).in_features if width else 0
        if width < own:
            raise_on_fill(width, own)
        return width

    def _keep_wide(self, device: Any) -> None:
        """Loads a widened `img_in`, and patched layers that the host cannot patch where they are (norms of older
        hosts), which it would leave as they were."""
        width = self._check_width()
        places = {key.rpartition(".")[0] for key in self.patches}
        for name, layer in self.model.named_modules():
            stays = hasattr(layer, "comfy_cast_weights") and not (width and name == LAYER)
            if name not in places or stays:
                continue
            comfy.model_patcher.wipe_lowvram_weight(layer)  # a second load may have hung the patches on it once more
            if getattr(layer, "comfy_patched_weights", False):
                continue
            for parameter, _ in list(layer.named_parameters(recurse=False)):
                self.patch_weight_to_device(f"{name}.{parameter}", device_to=device)  # type: ignore[attr-defined]
            layer.to(device)
            layer.comfy_patched_weights = True
            self.model.model_loaded_weight_memory += comfy.model_management.module_size(layer)


def raise_on_fill(width: int, channels: int) -> None:
    kind = "FLUX.1 Fill" if channels == FLUX_FILL.in_channels else "this model"
    raise BadInput(f"a control LoRA (FLUX.1 Depth or Canny, {width} channels) is on {kind}, whose img_in takes "
                   f"{channels}: they cannot be joined. Put the LoRA on FLUX.1 dev, or take it out")
