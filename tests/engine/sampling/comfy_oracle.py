"""Runs in a process of its own: reads single files of a ComfyUI checkout and saves what their functions compute.

    python comfy_oracle.py COMFYUI_PATH OUT.pt

Modules of ComfyUI that the files import but these functions do not call are replaced by empty ones, so neither the
host's dependencies nor its start-up are needed.
"""

import ast
import importlib.machinery
import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy
import torch


def empty(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Part(importlib.machinery.SourceFileLoader):
    """Runs only some functions (and classes) of a file; without a cache, which the whole file would be read from."""

    def __init__(self, path: Path, names: set[str]) -> None:
        super().__init__(path.stem, str(path))
        self.names = names

    def get_code(self, fullname: str) -> types.CodeType:
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if getattr(node, "name", None) in self.names]
        return compile(tree, self.path, "exec")


def functions(path: Path, names: set[str], scope: dict) -> dict:
    """Only these functions (and classes) of a file, run in `scope`."""
    module = types.ModuleType(path.stem)
    vars(module).update(scope)
    Part(path, names).exec_module(module)
    return vars(module)


def field(x, sigma, **extra):
    """A curved but smooth denoiser."""
    s = sigma.view(-1, 1, 1, 1)
    return torch.tanh(x * (1.3 - 0.5 * s)) * 0.8 + 0.1 * torch.sin(3 * x) + 0.05


class Bag(types.SimpleNamespace):
    pass


class Masked:
    """What KSamplerX0Inpaint wants of the model below it."""

    def __init__(self, sampling):
        self.inner_model = Bag(scale_latent_inpaint=lambda sigma, noise, latent_image, **_: sampling.noise_scaling(
            sigma.reshape(-1, 1, 1, 1), noise, latent_image))

    def __call__(self, x, sigma, **extra):
        return field(x, sigma)


def main(root: Path, out: Path) -> None:
    comfy = root / "comfy"
    for package in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.diffusionmodules", "kd"):
        empty(package, __path__=[])
    empty("comfy.ldm.modules.diffusionmodules.util", make_beta_schedule=None)
    for module in ("model_patcher", "memory_management"):
        empty(f"comfy.{module}")
    empty("comfy.utils", model_trange=lambda *steps, **_: range(*steps))  # newer versions' progress bar
    empty("torchsde")
    sampling = load("comfy.model_sampling", comfy / "model_sampling.py")
    sys.modules["comfy"].model_sampling = sampling
    sys.modules["comfy"].model_patcher = sys.modules["comfy.model_patcher"]
    empty("kd.utils", append_dims=lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)])
    for part in ("deis", "sa_solver"):
        empty(f"kd.{part}") if part == "sa_solver" else load(f"kd.{part}", comfy / "k_diffusion" / f"{part}.py")
    kd = load("kd.sampling", comfy / "k_diffusion" / "sampling.py")
    uni_pc = load("uni_pc", comfy / "extra_samplers" / "uni_pc.py")
    import scipy.stats
    names = {"simple_scheduler", "normal_scheduler", "beta_scheduler", "KSamplerX0Inpaint"}
    samplers = functions(comfy / "samplers.py", names, {"torch": torch, "math": math, "numpy": numpy, "scipy": scipy})
    result: dict = {"schedules": schedules(sampling, samplers), "noise": noise(comfy / "sample.py")}
    result["tables"] = {"dev": sampling.ModelSamplingFlux().sigmas, "schnell": schnell(sampling).sigmas}
    result["percent"] = [(p, sampling.ModelSamplingFlux().percent_to_sigma(p)) for p in (0.0, 0.1, 0.35, 0.9, 1.0)]
    result["solvers"] = solvers(kd, uni_pc)
    result["masked"] = masked(samplers["KSamplerX0Inpaint"], sampling)
    torch.save(result, out)


def schnell(sampling):
    return sampling.ModelSamplingDiscreteFlow(Bag(sampling_settings={"shift": 1.0, "multiplier": 1.0}))


def schedules(sampling, samplers) -> dict:
    found = {}
    for variant, model in (("dev", sampling.ModelSamplingFlux()), ("schnell", schnell(sampling))):
        for steps in (*range(1, 40), 50, 77, 100, 150):
            found[variant, "simple", steps] = samplers["simple_scheduler"](model, steps)
            found[variant, "normal", steps] = samplers["normal_scheduler"](model, steps)
            found[variant, "sgm_uniform", steps] = samplers["normal_scheduler"](model, steps, sgm=True)
            found[variant, "beta", steps] = samplers["beta_scheduler"](model, steps)
    return found


def noise(path: Path) -> dict:
    draw = functions(path, {"prepare_noise", "prepare_noise_inner"}, {"torch": torch, "np": numpy})["prepare_noise"]
    latent = torch.zeros(3, 16, 6, 5)
    return {(seed, index): draw(latent, seed, index)
            for seed in (0, 1, 123456789, 2**63, 2**64 - 1) for index in (None, (0, 1, 2), (4, 1, 4))}


def solvers(kd, uni_pc) -> dict:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5)
    model = sys.modules["comfy.model_sampling"].ModelSamplingFlux()
    field.inner_model = Bag(model_patcher=Bag(get_model_object=lambda name: model))  # newer versions ask for it
    found = {"x": x}
    for steps in (1, 2, 3, 4, 8, 20):
        sigmas = torch.cat([model.sigma(torch.linspace(1, 1 / steps, steps)), torch.zeros(1)])
        for end in (0, 1) if steps > 2 else (0,):
            cut = sigmas[:len(sigmas) - end]
            run = {name: getattr(kd, f"sample_{name}") for name in
                   ("euler", "heun", "dpmpp_2m", "deis", "ipndm", "res_multistep")}
            run["euler_ancestral"] = lambda *a, **k: kd.sample_euler_ancestral_RF(*a, noise_sampler=renoise(), **k)
            if steps > 1:
                run["uni_pc"] = uni_pc.sample_unipc
            for name, function in run.items():
                found[name, steps, end] = (cut.clone(), function(field, x.clone(), cut.clone(), extra_args={},
                                                                 disable=True))
    return found


def renoise():
    generator = torch.Generator().manual_seed(7)
    return lambda sigma, following: torch.randn((2, 4, 6, 5), generator=generator)


def masked(inpaint, sampling) -> dict:
    torch.manual_seed(1)
    noise, latent, mask, x = (torch.randn(2, 4, 6, 5) for _ in range(4))
    mask = mask.sigmoid()
    wrapper = inpaint(Masked(sampling.CONST()), None)
    wrapper.latent_image, wrapper.noise = latent, noise
    return {"noise": noise, "latent": latent, "mask": mask, "x": x,
            "out": wrapper(x, torch.tensor([0.6, 0.6]), mask)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
