"""The command line's grammar. Must import in milliseconds: no torch, no models."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

SEED_MAX = 2**64 - 1
DTYPES = ("auto", "bf16", "fp16", "fp32")
PARTS = ("transformer", "t5", "clip_l")
MEMORY = ("auto", "full", "stream", "cpu")
LAYOUTS = ("kohya", "peft")
MODEL_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
LORA_DTYPES = ("same", "fp16", "bf16", "fp32")


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage: an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _non_negative(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _whole(text: str, low: int, high: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low or (high is not None and value > high):
        span = f"below {low}" if high is None else f"outside {low} ... {high}"
        raise argparse.ArgumentTypeError(f"{value} is {span}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0, SEED_MAX)


def _setting(text: str) -> tuple[str, str, str]:
    """`NODE.input=value` -> its three parts. NODE may hold dots and colons (titles, `57:3`): the last dot before the
    first equals sign divides."""
    target, equals, value = text.partition("=")
    node, dot, name = target.rpartition(".")
    if not (equals and dot and node and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE.input=value, for example 31.seed=7")
    return node.strip(), name.strip(), value


def weighted(text: str) -> tuple[Path, float]:
    """`FILE:STRENGTH` or `FILE`, whose strength is 1. What follows the last colon belongs to the name where it is part
    of a path or has the ending of a model file (`C:\\loras\\a.safetensors`), or where a file is called so."""
    name, colon, strength = text.rpartition(":")
    if not colon or strength.lower().endswith(MODEL_ENDINGS) or "/" in strength or "\\" in strength:
        return Path(text), 1.0
    if Path(text).is_file():
        return Path(text), 1.0
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE:STRENGTH, for example style.safetensors:0.8")
    try:
        value = float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: strength {strength!r} is no number; write FILE:STRENGTH, for "
                                         "example style.safetensors:0.8") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: the strength is not a finite number")
    return Path(name), value


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", metavar="DIR", type=Path, action="append", default=[],
                         help="a folder laid out like ComfyUI's models folder, or a ComfyUI folder (may repeat)")


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: auto)")
    command.add_argument("--dtype", choices=DTYPES, default="auto",
                         help="precision of the computation (default: bf16 where the device has it in hardware, "
                              "else fp16, and fp32 on a CPU)")
    command.add_argument("--memory", choices=MEMORY, default="auto",
                         help="auto: on the device as far as they fit, else streamed block by block; full: never "
                              "streamed; stream: every block streamed; cpu: all on the CPU (default: auto)")
    command.add_argument("--preview", metavar="FILE", type=Path,
                         help="a .png to hold a small picture of every step, while it runs")


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser("generate", help="turn a sentence into pictures",
                                  description="Turn a sentence into pictures. Without --model: tiny-flux-dev.")
    command.add_argument("prompt", metavar="PROMPT", help="what the picture shows; may be empty")
    for flag, what in (("--model", "transformer or all-in-one file"), ("--t5", "T5 encoder"),
                       ("--clip", "CLIP-L encoder"), ("--vae", "autoencoder")):
        command.add_argument(flag, metavar="FILE", type=Path, help=f"{what}: a path, or a name in the model folders")
    _add_models(command)
    command.add_argument("--width", metavar="N", type=_positive, help="pixels (default: 128 for tiny-flux, 1024 else)")
    command.add_argument("--height", metavar="N", type=_positive, help="pixels (default: the same)")
    command.add_argument("--steps", metavar="N", type=_positive, help="default: 20; 4 for schnell")
    command.add_argument("--seed", metavar="N", type=_seed, default=0, help="0 ... 2^64-1 (default: 0)")
    command.add_argument("--guidance", metavar="X", type=_non_negative, default=None,
                         help="distilled guidance of dev models (default: 3.5)")
    command.add_argument("--lora", metavar="FILE:STRENGTH", dest="loras", type=weighted, action="append", default=[],
                         help="a LoRA, for the transformer and the text encoders: a path, or a name in the model "
                              "folders; strength 1 if none is given (may repeat)")
    command.add_argument("--negative", metavar="TEXT", help="what to keep out; needs --cfg above 1")
    command.add_argument("--cfg", metavar="X", type=_non_negative, default=1.0,
                         help="classifier-free guidance; above 1 every step runs twice (default: 1)")
    command.add_argument("--count", metavar="N", type=_positive, default=1,
                         help="pictures, with consecutive seeds and numbered files (default: 1)")
    command.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="a .png file")
    _add_machine(command)
    _add_json(command)


def _add_run(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser(
        "run", help="run a workflow file without ComfyUI",
        description="Run a workflow JSON (API or saved format), or the one inside a PNG, without ComfyUI.")
    command.add_argument("workflow", metavar="WORKFLOW", type=Path, help=".json, or a .png that carries a workflow")
    command.add_argument("--set", metavar="NODE.input=value", dest="settings", type=_setting, action="append",
                         default=[], help="change a widget; NODE is an id (57:3 inside a subgraph) or a title")
    _add_models(command)
    command.add_argument("--input", metavar="DIR", type=Path, action="append", default=[],
                         help="folder of pictures that the workflow loads (may repeat; default: ./input)")
    command.add_argument("--out", metavar="DIR", type=Path, default=Path("output"),
                         help="folder for the results (default: ./output)")
    _add_machine(command)
    _add_json(command)


def _add_quantize(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser(
        "quantize", help="make a smaller model file",
        description="Write a transformer, T5 or CLIP-L file in a smaller type: GGUF (Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, "
                    "Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K_M, Q3_K_S, Q2_K, BF16, F16) or safetensors "
                    "(fp8_scaled, int8_tensorwise).")
    command.add_argument("source", metavar="SRC", type=Path, help="a model file, a shard index or a folder")
    command.add_argument("destination", metavar="DST", type=Path, help="the file to write: .gguf, or .safetensors")
    command.add_argument("--type", metavar="T", required=True, help="what to make of the weights, for example Q4_K_M")
    command.add_argument("--part", choices=PARTS, help="which part of an all-in-one file")
    command.add_argument("--lora", metavar="FILE:STRENGTH", type=weighted, action="append", default=[],
                         help="a LoRA to put into the weights before they are made smaller (may repeat)")
    command.add_argument("--force", action="store_true", help="overwrite DST if it is there")
    command.add_argument("--device", default="auto", help="where to work it out: auto, cpu, cuda ... (default: auto)")
    _add_json(command)


def _add_lora(commands: argparse._SubParsersAction[Parser]) -> None:
    group = commands.add_parser("lora", help="make LoRA files", description="Make LoRA files: convert, merge, resize.")
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    convert = actions.add_parser("convert", help="into kohya's or PEFT's names", description=(
        "Write a LoRA of any format in kohya's or PEFT's (diffusers') names."))
    convert.add_argument("source", metavar="SRC", type=Path, help="a LoRA file")
    merge = actions.add_parser("merge", help="several into one", description=(
        "Write several LoRAs, each times its strength, as one. Without --rank nothing is lost and ranks add up."))
    merge.add_argument("loras", metavar="FILE:STRENGTH", type=weighted, nargs="+", help="for example style:0.8")
    resize = actions.add_parser("resize", help="to a smaller rank", description=(
        "Write the nearest LoRA of a smaller rank; layers that have no more are left as they are."))
    resize.add_argument("source", metavar="SRC", type=Path, help="a LoRA file")
    for command in (convert, merge, resize):
        command.add_argument("destination", metavar="DST", type=Path, help="the file to write: .safetensors")
        command.add_argument("--to", choices=LAYOUTS, required=command is convert,
                             help="whose names" + ("" if command is convert else " (default: the first file's)"))
        command.add_argument("--rank", metavar="N", type=_positive, required=command is resize,
                             help="the largest of any layer; the nearest LoRA of it is written")
        command.add_argument("--dtype", choices=LORA_DTYPES, default="same",
                             help="type of the numbers (default: as they are)")
        command.add_argument("--base", metavar="FILE", type=Path, action="append", default=[],
                             help="the model, for LoRAs that need its weights: OFT, GLoRA, IA3, DoRA (may repeat)")
        command.add_argument("--ignore-alpha", action="store_true", help="take every scale as 1")
        command.add_argument("--split-fix", action="store_true", help="undo what kohya's split_qkv lost of the scale")
        command.add_argument("--skip-broken", action="store_true", help="leave layers out that do not hold together")
        command.add_argument("--force", action="store_true", help="overwrite DST if it is there")
        _add_json(command)


def build_parser() -> Parser:
    parser = Parser(prog="flux-kit", description="FLUX.1 pictures from the command line: the engine, nodes and "
                    "workflow files of the ComfyUI node pack, without ComfyUI.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _add_generate(commands)
    _add_run(commands)
    _add_quantize(commands)
    _add_lora(commands)
    command = commands.add_parser("inspect", help="say what model files are", description="Say what model files are, "
                                  "from their headers. Exit code 1 if any file is refused.")
    command.add_argument("files", metavar="FILE", type=Path, nargs="+",
                         help=".safetensors, .sft, a shard index or a folder")
    _add_json(command)
    command = commands.add_parser("doctor", help="check this installation",
                                  description="Check packages, devices, model folders and the built-in tiny-flux.")
    _add_models(command)
    command.add_argument("--device", default="auto", help="the device to check (default: auto)")
    command.add_argument("--plans", action="store_true",
                         help="print instead how FLUX.1-dev of each precision fits on cards of 6 to 24 GiB")
    _add_json(command)
    return parser
