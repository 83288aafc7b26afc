"""Stand-in for ComfyUI's `comfy_api.latest.io`: what V3 nodes are declared with when there is no ComfyUI.

Only what Flux workflows use. A name it lacks fails where the node is defined, with the list of names there are.
How values reach `execute` (coercion, None for links, absent optionals stay absent) is in validation.py and executor.py.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NoReturn


class FolderType(str, Enum):
    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    image = "image_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    number = "number"
    slider = "slider"


class ControlAfterGenerate(str, Enum):
    fixed = "fixed"
    increment = "increment"
    decrement = "decrement"
    randomize = "randomize"


class Hidden(str, Enum):
    """Values a node receives from the executor in `cls.hidden`, not from the workflow."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


@dataclass(frozen=True)
class HiddenHolder:
    """`cls.hidden` during a call. What was not asked for, or is unknown, is None, as in core."""

    unique_id: str | None = None
    prompt: Any = None
    extra_pnginfo: Any = None
    dynprompt: Any = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # copy and pickle probe these; None there would break them
            raise AttributeError(name)


@dataclass
class Input:
    """A socket. `lazy` is accepted and ignored: this host computes every linked input."""

    io_type: ClassVar[str] = "*"
    id: str
    display_name: str | None = field(default=None, kw_only=True)
    optional: bool = field(default=False, kw_only=True)
    tooltip: str | None = field(default=None, kw_only=True)
    lazy: bool | None = field(default=None, kw_only=True)
    advanced: bool | None = field(default=None, kw_only=True)
    raw_link: bool | None = field(default=None, kw_only=True)
    extra_dict: dict[str, Any] | None = field(default=None, kw_only=True)


@dataclass
class WidgetInput(Input):
    """An input drawn as a widget: its value may stand in the workflow."""

    default: Any = field(default=None, kw_only=True)
    socketless: bool | None = field(default=None, kw_only=True)
    force_input: bool | None = field(default=None, kw_only=True)


@dataclass
class Output:
    io_type: ClassVar[str] = "*"
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False


class ComfyTypeIO:
    """A socket type; its Input and Output carry the same `io_type`."""

    io_type: ClassVar[str] = "*"
    Input: ClassVar[type[Input]] = Input
    Output: ClassVar[type[Output]] = Output


def _output(name: str) -> type[Output]:
    return type("Output", (Output,), {"io_type": name})


def Custom(io_type: str) -> type[ComfyTypeIO]:  # noqa: N802 - the name nodes know from core
    """A socket type by its name, e.g. Custom("LORA_STACK")."""
    members = {"io_type": io_type, "Input": type("Input", (Input,), {"io_type": io_type}), "Output": _output(io_type)}
    return type(f"{io_type.title()}Type", (ComfyTypeIO,), members)


class Boolean:
    io_type = "BOOLEAN"
    Output = _output("BOOLEAN")

    @dataclass
    class Input(WidgetInput):
        io_type = "BOOLEAN"
        label_on: str | None = field(default=None, kw_only=True)
        label_off: str | None = field(default=None, kw_only=True)


class Int:
    io_type = "INT"
    Output = _output("INT")

    @dataclass
    class Input(WidgetInput):
        io_type = "INT"
        min: int | None = field(default=None, kw_only=True)
        max: int | None = field(default=None, kw_only=True)
        step: int | None = field(default=None, kw_only=True)
        control_after_generate: bool | ControlAfterGenerate | None = field(default=None, kw_only=True)
        display_mode: NumberDisplay | None = field(default=None, kw_only=True)


class Float:
    io_type = "FLOAT"
    Output = _output("FLOAT")

    @dataclass
    class Input(WidgetInput):
        io_type = "FLOAT"
        min: float | None = field(default=None, kw_only=True)
        max: float | None = field(default=None, kw_only=True)
        step: float | None = field(default=None, kw_only=True)
        round: float | bool | None = field(default=None, kw_only=True)
        display_mode: NumberDisplay | None = field(default=None, kw_only=True)


class String:
    io_type = "STRING"
    Output = _output("STRING")

    @dataclass
    class Input(WidgetInput):
        io_type = "STRING"
        multiline: bool = field(default=False, kw_only=True)
        placeholder: str | None = field(default=None, kw_only=True)
        dynamic_prompts: bool | None = field(default=None, kw_only=True)


class Combo:
    io_type = "COMBO"
    Output = _output("COMBO")

    @dataclass
    class Input(WidgetInput):
        io_type = "COMBO"
        options: Sequence[str | int] | type[Enum] | None = None
        control_after_generate: bool | ControlAfterGenerate | None = field(default=None, kw_only=True)
        upload: UploadType | None = field(default=None, kw_only=True)
        image_folder: FolderType | None = field(default=None, kw_only=True)

        def __post_init__(self) -> None:
            if isinstance(self.options, type):
                self.options = [member.value for member in self.options]
            if isinstance(self.default, Enum):
                self.default = self.default.value


AnyType = Custom("*")
Image = Custom("IMAGE")
Mask = Custom("MASK")
Latent = Custom("LATENT")
Conditioning = Custom("CONDITIONING")
Model = Custom("MODEL")
Clip = Custom("CLIP")
Vae = Custom("VAE")
Sampler = Custom("SAMPLER")
Sigmas = Custom("SIGMAS")
Noise = Custom("NOISE")
Guider = Custom("GUIDER")
ControlNet = Custom("CONTROL_NET")
ClipVision = Custom("CLIP_VISION")
ClipVisionOutput = Custom("CLIP_VISION_OUTPUT")
StyleModel = Custom("STYLE_MODEL")
UpscaleModel = Custom("UPSCALE_MODEL")
LoraModel = Custom("LORA_MODEL")


def __getattr__(name: str) -> NoReturn:
    known = ", ".join(sorted(key for key in globals() if key[0].isupper() and key not in _NOT_TYPES))
    raise AttributeError(f"io.{name} is not known to the standalone host; a node here can use: {known}")


_NOT_TYPES = {"Any", "ClassVar", "Counter", "Enum", "NoReturn", "Sequence"}


@dataclass
class Schema:
    """What a node is: its public id, sockets and flags. Fields that only a browser reads are kept and not used."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    search_aliases: list[str] | None = None
    essentials_category: str | None = None
    is_dev_only: bool = False

    def finalize(self) -> None:
        """Normalise absent lists and ids; output nodes always get `prompt` and `extra_pnginfo`, as in core."""
        self.inputs, self.outputs = list(self.inputs or []), list(self.outputs or [])
        self.hidden = list(self.hidden or [])
        wanted = [Hidden.prompt, Hidden.extra_pnginfo] if self.is_output_node else []
        self.hidden += [name for name in wanted if name not in self.hidden]
        for index, output in enumerate(self.outputs):
            output.id = output.id or f"_{index}_{output.io_type}_"

    def validate(self) -> None:
        """ValueError if an input or output is of another kind, or an id occurs twice."""
        for kind, entries in ((Input, self.inputs), (Output, self.outputs)):
            for entry in entries:
                if not isinstance(entry, kind):
                    raise ValueError(f"node {self.node_id}: {entry!r} is no {kind.__name__} of this host's io")
        ids = Counter([i.id for i in self.inputs] + [str(o.id) for o in self.outputs])
        twice = sorted(name for name, count in ids.items() if count > 1)
        if twice:
            raise ValueError(f"node {self.node_id}: ids used twice among inputs and outputs: {', '.join(twice)}")


class NodeOutput:
    """What `execute` returns: one positional value an output, and `ui`, a dict or an object with `as_dict()`."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args = args
        self.ui = ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class _Locked(type):
    """Class of the clone a node runs on: core forbids state there, so a node that tries must fail here too."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"cannot set '{name}': node classes hold no state between calls")


class ComfyNode:
    """Base of all nodes: `define_schema` and `execute`; `validate_inputs` and `fingerprint_inputs` if need be."""

    hidden: ClassVar[HiddenHolder] = HiddenHolder()

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError(f"{cls.__name__} lacks define_schema")

    @classmethod
    def execute(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} lacks execute")

    @classmethod
    def GET_SCHEMA(cls) -> Schema:  # noqa: N802 - core's name
        """A fresh, checked schema; options that list files are read anew each time."""
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        return schema

    @classmethod
    def call(cls, method: str, hidden: HiddenHolder, arguments: dict[str, Any]) -> Any:
        """Run classmethod `method` on a locked clone of the class, so that nothing stays; coroutines are awaited."""
        clone = _Locked(cls.__name__, (cls,), {"hidden": hidden, "__module__": cls.__module__})
        result = getattr(clone, method)(**arguments)
        return asyncio.run(result) if inspect.iscoroutine(result) else result
