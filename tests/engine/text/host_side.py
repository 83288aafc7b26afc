"""Run by test_host.py in a process of its own, inside a ComfyUI checkout: what the host makes of the same prompts.

usage: host_side.py CHECKOUT WORKDIR
reads request.json, clip.safetensors, t5.safetensors in WORKDIR; writes tokens.json, states.pt
"""

import json
import sys
from pathlib import Path

checkout, workdir = sys.argv[1], Path(sys.argv[2])
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, checkout)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
import transformers  # noqa: E402
from comfy import sd1_clip  # noqa: E402
from comfy.text_encoders.flux import FluxTokenizer  # noqa: E402
from comfy.text_encoders.sd3_clip import T5XXLModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def main() -> None:
    request = json.loads((workdir / "request.json").read_text("utf-8"))
    tokenizer = FluxTokenizer()
    tokens = [tokenizer.tokenize_with_weights(prompt) for prompt in request["prompts"]]
    (workdir / "tokens.json").write_text(json.dumps({"transformers": transformers.__version__, "tokens": tokens}))

    clip = sd1_clip.SDClipModel(
        device="cpu",
        dtype=torch.float32,
        return_projected_pooled=False,
        model_options={"model_name": "clip_l", "clip_l_model_config": request["clip"]},
    )
    t5 = T5XXLModel(device="cpu", dtype=torch.float32, model_options={"t5xxl_model_config": request["t5"]})
    problems = [
        clip.load_sd(load_file(workdir / "clip.safetensors")),
        t5.load_sd(load_file(workdir / "t5.safetensors")),
    ]
    assert not any(problem.unexpected_keys for problem in problems), problems
    assert {name for problem in problems for name in problem.missing_keys} <= {"text_projection.weight"}, problems
    states = []
    with torch.no_grad():
        for prompt in request["encode"]:
            both = tokenizer.tokenize_with_weights(prompt)
            cond, _ = t5.encode_token_weights(both["t5xxl"])
            clip_states, pooled = clip.encode_token_weights(both["l"])
            states.append({"cond": cond, "clip": clip_states, "pooled": pooled})
    torch.save(states, workdir / "states.pt")


main()
