"""Packs that put something in the place of blocks: a cache for all of them, or a processor for each."""

from unittest.mock import patch

import torch
from comfy.ldm.flux.math import attention


class AllBlocks(torch.nn.Module):
    """In place of both lists: runs the first double block, and the others only when its change is news."""

    def __init__(self, doubles, singles, threshold):
        super().__init__()
        self.doubles, self.singles, self.threshold = doubles, singles, threshold
        self.first = self.rest = None

    def forward(self, img, txt, *arguments, **keywords):
        entered = img.clone()  # core's blocks add to their inputs in place
        img, txt = self.doubles[0](img, txt, *arguments, **keywords)
        change = img - entered
        if self.first is not None and self.first.shape == change.shape:
            news = float((change - self.first).abs().mean() / self.first.abs().mean())
            if news < self.threshold:
                return img + self.rest[0], txt + self.rest[1]
        self.first, began = change, (img.clone(), txt.clone())
        for block in self.doubles[1:]:
            img, txt = block(img, txt, *arguments, **keywords)
        length = txt.shape[1]
        x = torch.cat([txt, img], dim=1)
        for block in self.singles:
            x = block(x, *arguments, **keywords)
        txt, img = x[:, :length], x[:, length:]
        self.rest = (img - began[0], txt - began[1])
        return img, txt


class Through(torch.nn.Module):
    def forward(self, x, *arguments, **keywords):
        return x


class FirstBlockCache:
    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "threshold": ("FLOAT", {"default": 0.1})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "stand-ins"

    def run(self, model, threshold):
        model = model.clone()
        net = model.get_model_object("diffusion_model")
        if net.__class__.__name__ != "Flux":
            raise ValueError(f"{net.__class__.__name__} is not a model this pack knows")
        cache = AllBlocks(net.double_blocks, net.single_blocks, threshold)
        double, single = torch.nn.ModuleList([cache]), torch.nn.ModuleList([Through()])

        def wrapper(apply, call):
            if float(call["timestep"].max()) > 0.99:
                cache.first = cache.rest = None
            with patch.object(net, "double_blocks", double), patch.object(net, "single_blocks", single):
                return apply(call["input"], call["timestep"], **call["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class Processed(torch.nn.Module):
    """A double block whose parts a processor puts together anew, with attention to more tokens beside its own."""

    def __init__(self, block, strength, seed):
        super().__init__()
        for name in ("img_mod", "img_norm1", "img_attn", "img_norm2", "img_mlp", "txt_mod", "txt_norm1", "txt_attn",
                     "txt_norm2", "txt_mlp"):
            setattr(self, name, getattr(block, name))
        self.num_heads, self.hidden_size, self.strength = block.num_heads, block.hidden_size, strength
        draw = torch.Generator().manual_seed(seed)
        self.key, self.value = (torch.randn(1, self.num_heads, 6, self.hidden_size // self.num_heads, generator=draw)
                                for _ in range(2))

    def heads(self, part, x):
        q, k, v = part.qkv(x).view(x.shape[0], x.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return (*part.norm(q, k, v), v)

    def forward(self, img, txt, vec, pe, attn_mask=None, **keywords):
        mods = {"img": self.img_mod(vec), "txt": self.txt_mod(vec)}
        streams = {"img": img, "txt": txt}
        parts = {name: self.heads(getattr(self, f"{name}_attn"), (1 + mods[name][0].scale)
                                  * getattr(self, f"{name}_norm1")(x) + mods[name][0].shift)
                 for name, x in streams.items()}
        q, k, v = (torch.cat((a, b), dim=2) for a, b in zip(parts["txt"], parts["img"], strict=True))
        found = attention(q, k, v, pe=pe, mask=attn_mask)
        attended = {"txt": found[:, :txt.shape[1]], "img": found[:, txt.shape[1]:]}
        for name, x in streams.items():
            first, second = mods[name]
            x = x + first.gate * getattr(self, f"{name}_attn").proj(attended[name])
            streams[name] = x + second.gate * getattr(self, f"{name}_mlp")(
                (1 + second.scale) * getattr(self, f"{name}_norm2")(x) + second.shift)
        beside = torch.nn.functional.scaled_dot_product_attention(
            parts["img"][0], self.key.to(img), self.value.to(img)).transpose(1, 2).flatten(2)
        return streams["img"] + self.strength * beside, streams["txt"]


class Processors:
    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {"default": 0.5})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "stand-ins"

    def run(self, model, strength):
        model = model.clone()
        for i, block in enumerate(model.get_model_object("diffusion_model").double_blocks):
            model.add_object_patch(f"diffusion_model.double_blocks.{i}", Processed(block, strength, i))
        return (model,)
