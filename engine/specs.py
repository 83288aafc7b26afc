"""What the shapes of a checkpoint do not tell, and the published sizes of FLUX.1.

A spec is a frozen row. Sizes are read off the header of a file (`engine.weights.detect`); what a header cannot say
(head widths, epsilons, activations, rope) has its published value as default here and is asserted against the
published configurations in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GROUP_NORM_GROUPS = 32
GROUP_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FluxSpec:
    """The flow transformer (black-forest-labs/flux, src/flux/model.py `FluxParams`)."""

    in_channels: int = 64           # 64 latent; 128 = + control latent; 384 = + masked latent + mask
    out_channels: int = 64
    vec_in_dim: int = 768           # pooled CLIP-L
    context_in_dim: int = 4096      # T5-XXL
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True
    norm_eps: float = 1e-6          # LayerNorm (no affine) and q/k RMSNorm
    frequency_dim: int = 256        # sinusoidal embedding of time and guidance
    patch_size: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def variant(self) -> str:
        """`fill` or `control` by the width of `img_in`, else `dev` or `schnell` by the guidance embedding."""
        return {384: "fill", 128: "control"}.get(self.in_channels, "dev" if self.guidance_embed else "schnell")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """The 16-channel autoencoder (black-forest-labs/flux, src/flux/modules/autoencoder.py `AutoEncoderParams`)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611    # model latents = scale * (raw - shift)
    shift_factor: float = 0.1159

    @property
    def downscale(self) -> int:
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class T5Spec:
    """T5 v1.1 encoder (google/t5-v1_1-xxl): gated GELU (tanh), RMS norms, no scaling of q, no biases."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    num_heads: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1


@dataclass(frozen=True, kw_only=True)
class ClipTextSpec:
    """CLIP text tower (openai/clip-vit-large-patch14): causal, quick GELU, pooled at the end-of-text token."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407


@dataclass(frozen=True, kw_only=True)
class SiglipSpec:
    """SigLIP vision tower (google/siglip-so400m-patch14-384): no class token, GELU (tanh), a norm at the end."""

    num_channels: int = 3
    image_size: int = 384           # pictures are resized to this square; what the patches do not fill is cut
    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True    # attention pooling to one vector, which FLUX.1 does not read
    image_mean: float = 0.5
    image_std: float = 0.5

    @property
    def num_positions(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class ReduxSpec:
    """FLUX.1 Redux's projector (black-forest-labs/flux, src/flux/modules/image_embedders.py `ReduxImageEncoder`)."""

    redux_dim: int = 1152           # width of the vision encoder
    txt_in_features: int = 4096     # width of T5

    @property
    def hidden_size(self) -> int:
        return 3 * self.txt_in_features


FLUX_DEV = FluxSpec()
FLUX_SCHNELL = replace(FLUX_DEV, guidance_embed=False)
FLUX_FILL = replace(FLUX_DEV, in_channels=384)
FLUX_CONTROL = replace(FLUX_DEV, in_channels=128)
FLUX_AE = AutoencoderSpec()
T5_XXL = T5Spec()
CLIP_L = ClipTextSpec()
SIGLIP = SiglipSpec()
REDUX = ReduxSpec()

DEFAULT_GUIDANCE = 3.5
"""What a conditioning without a `guidance` entry means, the negative included (ComfyUI's rule)."""
