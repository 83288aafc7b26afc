"""Where BFL's published code, diffusers and ComfyUI's core differ on FLUX.1's conditioning, what Flux Kit does, and the
test that shows it. docs/deviations.md is made of these rows by docs/tools/deviations.py."""

from __future__ import annotations

from dataclasses import dataclass

SAME, NAMED, NONE = "as BFL", "named difference", "not in BFL's code"
VERDICTS = (SAME, NAMED, NONE)
UNIT, NODES, COMFY = "tests/engine/conditioning/", "tests/nodes/", "tests/hosts/comfyui/"
STRUCTURE, HERE = UNIT + "test_structure.py::", UNIT + "test_deviations.py::"
FILL, KONTEXT, REDUX = (f"{UNIT}test_{name}.py::" for name in ("fill", "kontext", "redux"))


@dataclass(frozen=True)
class Deviation:
    """`checks`: `file::test` of each test that shows what `ours` says."""

    id: str
    topic: str
    bfl: str
    others: str
    ours: str
    verdict: str
    checks: tuple[str, ...]


def row(number: int, topic: str, bfl: str, others: str, ours: str, verdict: str, *checks: str) -> Deviation:
    return Deviation(f"D{number}", topic, bfl, others, ours, verdict, checks)


DEVIATIONS: tuple[Deviation, ...] = (
    row(1, "Fill, soft mask", "image x (1 - m), m kept soft",
        "diffusers: binary from 0.5; core: image by a rounded mask, channels soft",
        "soft; binary is a widget's choice", SAME, FILL + "test_d1_soft_masks_are_the_official_recipe",
        FILL + "test_d1_binary_is_diffusers_threshold"),
    row(2, "Fill, odd size", "refuses unless /32", "diffusers: stretches to 1024 x 1024; core: cuts to /8 in silence",
        "padded by its edge to /16, told, and taken off again by Decode and Region Paste; or stretched; or an error",
        NAMED, FILL + "test_d2_an_odd_size_comes_back"),
    row(3, "Sizes /8 but not /16", "up to 16", "diffusers: down to 16; core: padded with the opposite edge",
        "no conditioning node leaves a size off the grid of 16; what is added is the edge", SAME,
        FILL + "test_d3_no_size_is_left_off_the_grid", FILL + "test_d3_what_is_added_is_the_edge_and_is_taken_off"),
    row(4, "Picture and latent of other sizes", "error",
        "diffusers: resizes pixels; core: cuts and resizes latents in silence", "the node makes both, of one size",
        SAME, FILL + "test_d4_conditioning_and_latent_have_one_size"),
    row(5, "Fill model without picture", "not possible", "diffusers: error; core: zeros with a full mask",
        "a full mask is BFL's all-masked", SAME, FILL + "test_d5_a_full_mask_is_the_official_all_masked"),
    row(6, "Fill's picture on a model of 64 channels", "not possible", "diffusers: error; core: ignored in silence",
        "refused, with the model's kind", NAMED, FILL + "test_d6_a_model_that_ignores_the_picture_is_refused"),
    row(7, "Batches", "one", "diffusers: divides or error; core: a broadcast error of torch",
        "one for all or one for each, else refused with both numbers", NAMED,
        FILL + "test_d7_batches_fit_or_are_named"),
    row(8, "Noise mask in Fill", "none", "core: on unless switched off", "none unless asked", SAME,
        FILL + "test_d8_no_noise_mask_unless_asked"),
    row(9, "Guidance", "Fill 30, Depth 10, Canny 30, else 2.5", "diffusers: 30, 3.5; core: 3.5 for all",
        "the node sets BFL's: Fill 30, Depth 10, Canny 30, Kontext 2.5; prompts without one mean 3.5, as in core",
        SAME, FILL + "test_d9_guidance", STRUCTURE + "test_d9_guidance_presets"),
    row(10, "Time shift", "by tokens", "core: fixed 1.15 unless a node changes it",
        "by tokens in Flux Sampler's schedule bfl, and by Flux Auto Shift for core's samplers", SAME,
        "tests/engine/sampling/test_sigmas.py::test_bfl", "tests/engine/sampling/test_sigmas.py::test_shift_by_size"),
    row(11, "T5's length", "128 Fill, 256 schnell, 512 else", "diffusers: 512; core: at least 256, never cut",
        "as core, or exactly 128, 256 or 512 by a widget", NAMED,
        "tests/engine/text/test_encode.py::test_exact_lengths",
        "tests/engine/text/test_encode.py::test_long_prompts_are_not_cut"),
    row(12, "Weights in prompts", "literal, cut at 77", "core: (x:1.2) is a weight, long prompts in pieces",
        "as core, so that shared prompts mean the same; escaped brackets are literal", NAMED,
        "tests/engine/text/test_weighting.py::test_rules",
        "tests/engine/text/test_weighting.py::test_escaped_text_is_text"),
    row(13, "Autoencoder", "mean of the posterior", "diffusers: a sample in Fill and Control", "the mean", SAME,
        HERE + "test_d13_encoding_is_the_mean_and_repeats"),
    row(14, "Noise of a seed", "bf16 on the CPU", "diffusers: after samples of the autoencoder; core: fp32 on the CPU",
        "core's noise; the same noise gives BFL's result", NAMED,
        KONTEXT + "test_d14_the_same_noise_gives_the_same_edit_in_the_formula_and_the_sampler"),
    row(15, "Pictures given as latents", "none", "diffusers: scaled a second time",
        "raw latents, as the conditioning holds them, are scaled once", NONE,
        HERE + "test_d15_latents_are_scaled_once"),
    row(16, "Redux, crop", "stretched", "core: cut to the middle by default", "stretched; cut or letterboxed if asked",
        SAME, REDUX + "test_d16_the_picture_is_stretched_unless_the_user_says_otherwise"),
    row(17, "Redux, text", "empty prompt", "diffusers: zeros without encoders", "whatever prompt is connected", NAMED,
        REDUX + "test_d17_the_text_stays_whatever_it_is"),
    row(18, "Redux, several pictures", "one", "diffusers: a weighted sum with the text; core: one after the other",
        "one after the other, or their mean; the text stays", NONE,
        REDUX + "test_d18_several_pictures_follow_each_other_and_leave_the_text_alone"),
    row(19, "Redux, strength 0", "none", "core: multiply 0 is not off, bias 0 is NaN", "off, bit for bit", NONE,
        REDUX + "test_d19_strength_0_is_off_and_a_tiny_one_nearly"),
    row(20, "Redux strength with Kontext", "none", "core: crash", "the mask covers the references, in either order",
        NONE, REDUX + "test_d20_with_kontext_every_strength_is_finite_and_by_formula",
        KONTEXT + "test_d20_before_or_behind_redux_is_the_same"),
    row(21, "Backends without masks", "none", "Nunchaku ignores them in silence", "the report says so", NONE,
        REDUX + "test_d21_the_report_names_backends_that_take_no_notice_of_a_mask"),
    row(22, "Kontext, size", "stretched to the nearest of 17", "diffusers: shrinks some of the 17; core: cut",
        "stretched to the same 17, to the bit where it is one already; or padded", SAME,
        KONTEXT + "test_d22_a_preferred_size_stays_to_the_bit",
        KONTEXT + "test_d22_the_picture_is_stretched_as_pil_does_and_nothing_is_cut"),
    row(23, "Several references", "one", "diffusers: fails; core: offset, index, uxo",
        "chained (core's offset), stitched right or down, or index; one is BFL's", SAME,
        KONTEXT + "test_d23_one_reference_lies_in_the_second_plane",
        KONTEXT + "test_d23_a_chain_has_the_positions_of_the_stitched_picture"),
    row(24, "Positions", "fp32", "diffusers: the model's dtype; core: bf16 in 0.3.64", "fp32, angles in fp64", SAME,
        KONTEXT + "test_d24_positions_of_wide_strips_are_all_different"),
    row(25, "Map, resizing", "pixels, LANCZOS, then the detector",
        "diffusers: pixels, 1024 x 1024; core: latents, after the detector",
        "pixels, LANCZOS, before encoding; Structure Map also before the detector", SAME,
        STRUCTURE + "test_d25_the_map_is_resized_in_pixels_before_it_is_encoded",
        NODES + "test_conditioning_structure.py::test_d25_a_run_is_the_official_recipe"),
    row(26, "Canny", "OpenCV, 50 and 200, on RGB, after floats that make 63 of the 256 levels one darker",
        "core: kornia on grey with a blur",
        "OpenCV's edges to the bit, of the picture's own levels, whether it is installed or not", NAMED,
        UNIT + "test_preprocess.py::test_d26_edges_are_opencv_s_to_the_bit",
        UNIT + "test_preprocess.py::test_d26_edges_are_the_installed_opencv_s"),
    row(27, "Depth, range", "raw / 127.5 - 1", "nodes for it: each picture's range",
        "each picture's range, or raw as BFL; near is white for models of distances too", NAMED,
        UNIT + "test_preprocess.py::test_d27_depth_is_stretched_to_its_range_or_left_raw"),
    row(28, "Control LoRA", "rank 128 with biases, img_in 64 -> 128, norms replaced at any scale",
        "core: the map is dropped where img_in is not loaded or is packed, then a matrix error",
        "the same loaded, partly loaded and on packed weights; strength 0 is off, norms included", NAMED,
        "tests/engine/adapters/test_attach.py::test_control_lora_widens_the_model",
        NODES + "test_conditioning_structure.py::test_d28_a_control_lora_is_the_formula_at_any_strength",
        COMFY + "test_conditioning_structure.py::test_d28_a_control_lora_however_much_is_loaded"),
    row(29, "Control LoRA on Fill", "not possible", "diffusers: error; core: 'new shape must be larger'",
        "refused, with both widths and what to do", NAMED,
        NODES + "test_conditioning_structure.py::test_d29_a_control_lora_on_fill_is_refused"),
    row(30, "8-bit resampling", "PIL, rounded", "core: truncated, half a level darker each time",
        "rounded as PIL where the picture has 8 bits, else no such step", SAME,
        UNIT + "test_resample.py::test_d30_8_bits_are_pil_s_and_are_rounded",
        UNIT + "test_regions.py::test_d30_no_step_of_8_bits"),
    row(31, "Outpainting canvas", "black, overlap on every side, nearest /32", "core: grey, soft feather inside, slow",
        "binary mask, overlap on padded sides only, sides only grow", NAMED,
        UNIT + "test_canvas.py::test_d31_the_mask_is_binary_and_overlaps_on_padded_sides_only",
        UNIT + "test_canvas.py::test_equal_to_the_official_demo_where_all_sides_grow"),
    row(32, "Key noise_concat", "none", "core: overrides concat_latent_image and works on partly loaded models",
        "set beside concat_latent_image only where a model's input is not wide yet", NONE,
        STRUCTURE + "test_d32_the_key_that_asks_nothing_of_the_model",
        COMFY + "test_conditioning_structure.py::test_d28_a_control_lora_however_much_is_loaded"),
)

HEAD = """# Deviations

Where Black Forest Labs' code (BFL), diffusers and ComfyUI's core differ on what FLUX.1 is conditioned on, and what Flux
Kit does. BFL's recipe is right wherever they differ; where Flux Kit does something else on purpose, the last but one
column says so. Made by `python -P docs/tools/deviations.py` from `tests/support/deviations.py`; a test compares.
"""
COLUMNS = ("", "Topic", "BFL", "Others", "Flux Kit", "That is", "Shown by")


def document() -> str:
    """docs/deviations.md."""
    lines = [HEAD, f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for item in DEVIATIONS:
        shown = "<br>".join(f"`{check.rpartition('/')[2]}`" for check in item.checks)
        cells = (item.id, item.topic, item.bfl, item.others, item.ours, item.verdict, shown)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
