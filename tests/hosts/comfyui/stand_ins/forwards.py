"""Packs that replace `forward_orig` as a whole: to leave out steps, or to add to the tokens between blocks."""

import types
from unittest.mock import patch

import torch
from comfy.ldm.flux.layers import timestep_embedding


def embedded(net, img, img_ids, txt, txt_ids, timesteps, y, guidance):
    """BFL's forward up to the blocks, by the public parts of the class."""
    img = net.img_in(img)
    vec = net.time_in(timestep_embedding(timesteps, 256).to(img.dtype))
    if net.params.guidance_embed and guidance is not None:
        vec = vec + net.guidance_in(timestep_embedding(guidance, 256).to(img.dtype))
    vec = vec + net.vector_in(y[:, :net.params.vec_in_dim])
    return img, net.txt_in(txt), vec, net.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))


class StepCache:
    """Leaves the blocks out while the first block's modulated input has moved little, and repeats their last sum."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "threshold": ("FLOAT", {"default": 0.4}),
                             "signature": (["classic", "newer"],)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "stand-ins"

    def run(self, model, threshold, signature):
        model = model.clone()
        net = model.get_model_object("diffusion_model")
        state = {"moved": 0.0, "before": None, "sum": None, "left out": 0}

        def classic(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None,
                    transformer_options={}, attn_mask=None):  # noqa: B006
            img, txt, vec, pe = embedded(self, img, img_ids, txt, txt_ids, timesteps, y, guidance)
            first, _ = self.double_blocks[0].img_mod(vec)
            now = (1 + first.scale) * self.double_blocks[0].img_norm1(img.clone()) + first.shift
            if state["before"] is not None and state["before"].shape == now.shape:
                state["moved"] += float((now - state["before"]).abs().mean() / state["before"].abs().mean())
            compute = state["sum"] is None or state["before"].shape != now.shape or state["moved"] >= threshold
            state["before"] = now
            if not compute:
                state["left out"] += 1
                return self.final_layer(img + state["sum"], vec)
            state["moved"], entered = 0.0, img.clone()
            replace = transformer_options.get("patches_replace", {}).get("dit", {})
            assert not replace
            for block in self.double_blocks:
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)
            img = torch.cat((txt, img), 1)
            for block in self.single_blocks:
                img = block(img, vec=vec, pe=pe, attn_mask=attn_mask)
            img = img[:, txt.shape[1]:, ...]
            state["sum"] = img - entered
            return self.final_layer(img, vec)

        def newer(self, *arguments, timestep_zero_index=None, **keywords):
            return classic(self, *arguments, **keywords)

        forward = types.MethodType(classic if signature == "classic" else newer, net)

        def wrapper(apply, call):
            if float(call["timestep"].max()) > 0.99:
                state.update(moved=0.0, before=None, sum=None)
            with patch.object(net, "forward_orig", forward):
                return apply(call["input"], call["timestep"], **call["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class Identity:
    """Adds a face's tokens to the image between blocks, by a `forward_orig` that stays on the network."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "weight": ("FLOAT", {"default": 1.0}),
                             "signature": (["classic", "newer"],)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "stand-ins"

    def run(self, model, weight, signature):
        model = model.clone()
        net = model.model.diffusion_model
        draw = torch.Generator().manual_seed(5)
        width = net.hidden_size
        face = torch.randn(1, 8, width, generator=draw)
        to_q, to_k, to_v = (torch.randn(width, width, generator=draw) * width**-0.5 for _ in range(3))

        def seen(img):
            q, k, v = img @ to_q, face.to(img) @ to_k, face.to(img) @ to_v
            return weight * torch.softmax(q @ k.transpose(1, 2) * width**-0.5, dim=-1) @ v

        def classic(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None,
                    transformer_options={}, attn_mask=None):  # noqa: B006
            img, txt, vec, pe = embedded(self, img, img_ids, txt, txt_ids, timesteps, y, guidance)
            for i, block in enumerate(self.double_blocks):
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
                if i % 2 == 0:
                    img = img + seen(img)
            x = torch.cat((txt, img), 1)
            for i, block in enumerate(self.single_blocks):
                x = block(x, vec=vec, pe=pe)
                if i % 4 == 0:
                    real, txt = x[:, txt.shape[1]:, ...], x[:, :txt.shape[1], ...]
                    x = torch.cat((txt, real + seen(real)), 1)
            return self.final_layer(x[:, txt.shape[1]:, ...], vec)

        def newer(self, *arguments, timestep_zero_index=None, **keywords):
            return classic(self, *arguments, **keywords)

        net.forward_orig = types.MethodType(classic if signature == "classic" else newer, net)
        return (model,)
