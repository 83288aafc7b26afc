"""From noise to latents: schedules, solvers, the denoiser and the loop that joins them."""

from .denoiser import Conditioning, Denoiser
from .latents import (
    empty_latent,
    fit_channels,
    fit_preview_factors,
    image_seq_len,
    latent_preview,
    make_noise,
    process_in,
    process_out,
)
from .sample import cfg_window_in_sigmas, cut_sigmas, differential, ksampler_sigmas, sample
from .sigmas import DEV_TABLE, SCHEDULES, SCHNELL_TABLE, FlowTable, make_sigmas, mu_for_seq_len, table_for
from .slots import reference_tokens
from .solvers import SOLVERS

__all__ = [
    "DEV_TABLE", "SCHEDULES", "SCHNELL_TABLE", "SOLVERS", "Conditioning", "Denoiser", "FlowTable",
    "cfg_window_in_sigmas", "cut_sigmas", "differential",
    "empty_latent", "fit_channels", "fit_preview_factors", "image_seq_len", "ksampler_sigmas", "latent_preview",
    "make_noise", "make_sigmas", "mu_for_seq_len", "process_in", "process_out", "reference_tokens",
    "sample", "table_for",
]
