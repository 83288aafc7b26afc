"""tiny-flux in diffusers' own FluxPipeline, step by step.

tiny-flux was trained by this project's code and would have learned its way round a wrong convention. Here everything
that leads to a picture is diffusers' and transformers': tokenising, encoding, ids, guidance, the Euler step, decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compare import relative
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_kit.engine.sampling import Denoiser, make_noise, make_sigmas, sample, table_for
from flux_kit.tiny_flux.score import Studio
from flux_kit.tiny_flux.vocabulary import clip_tokenizer, t5_tokenizer
from oracles import autoencoder_oracle, clip_oracle, flux_oracle, t5_oracle
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

TOLERANCE = 1e-4
PROMPT = "a large red circle on the left on a blue background"
STEPS = {"dev": 6, "schnell": 4}


def pipeline_of(studio: Studio) -> FluxPipeline:
    def tokenizer(backend: Tokenizer, pad: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, model_max_length=77)

    vae = autoencoder_oracle(studio.autoencoder.spec, studio.autoencoder.state_dict())
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False), vae=vae,
        text_encoder=clip_oracle(studio.text.clip.spec, studio.text.clip.state_dict()),
        tokenizer=tokenizer(clip_tokenizer(), "<|endoftext|>"),
        text_encoder_2=t5_oracle(studio.text.t5.spec, studio.text.t5.state_dict()),
        tokenizer_2=tokenizer(t5_tokenizer(), "<pad>"),
        transformer=flux_oracle(studio.flux.spec, studio.flux.state_dict()))


@pytest.fixture(scope="module", params=["dev", "schnell"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[str, Studio, FluxPipeline]]:
    studio = Studio(request.param)
    pipeline = pipeline_of(studio)
    pipeline.set_progress_bar_config(disable=True)
    yield request.param, studio, pipeline


@torch.no_grad()
def test_every_stage(pair: tuple[str, Studio, FluxPipeline]) -> None:
    member, studio, pipeline = pair
    width, height, seed = 160, 96, 12
    cond, pooled = studio.text.encode(PROMPT)
    embeds, pooled_embeds, _ = pipeline.encode_prompt(PROMPT, None, max_sequence_length=256)
    assert relative(cond, embeds) <= TOLERANCE
    assert relative(pooled, pooled_embeds) <= TOLERANCE

    sigmas = make_sigmas("bfl", STEPS[member], table=table_for(studio.flux.spec), image_seq_len=60)
    noise = make_noise((1, 16, height // 8, width // 8), seed)
    packed = noise.view(1, 16, height // 16, 2, width // 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 60, 64)

    theirs: list[Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda module, args, out: theirs.append(out[0]))
    final = pipeline(PROMPT, width=width, height=height, sigmas=sigmas[:-1].tolist(), num_inference_steps=STEPS[member],
                     guidance_scale=2.5, latents=packed, max_sequence_length=256, output_type="latent").images
    hook.remove()

    ours: list[Tensor] = []
    hook = studio.flux.register_forward_hook(lambda module, args, out: ours.append(out))
    denoiser = Denoiser(studio.flux, [[cond, {"pooled_output": pooled, "guidance": 2.5}]])
    latents = sample(denoiser, torch.zeros_like(noise), sigmas, noise=noise)
    hook.remove()

    assert len(ours) == len(theirs) == STEPS[member]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) <= TOLERANCE
    unpacked = pipeline._unpack_latents(final, height, width, pipeline.vae_scale_factor)
    assert relative(latents, unpacked / 0.3611 + 0.1159) <= TOLERANCE
    pixels = pipeline.vae.decode(unpacked / 0.3611 + 0.1159).sample
    assert relative(studio.autoencoder.decode(latents), pixels) <= TOLERANCE
