"""The stand-in for comfy_api's io: schemas, clones, and the port itself."""

from __future__ import annotations

import pytest
from flux_kit import hosts
from flux_kit.engine.errors import FluxKitError
from flux_kit.hosts.standalone import io


class Echo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Echo", inputs=[io.String.Input("text", default="a")], outputs=[io.String.Output()],
                         hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput(text, cls.hidden.unique_id)


def test_no_host_is_an_error_until_one_is_used(monkeypatch):
    monkeypatch.setattr(hosts, "_current", None)
    with pytest.raises(FluxKitError, match="no host was chosen"):
        hosts.current()
    marker = object()
    hosts.use(marker)  # type: ignore[arg-type]
    assert hosts.current() is marker


def test_core_type_names():
    names = {"Image": "IMAGE", "Mask": "MASK", "Latent": "LATENT", "Conditioning": "CONDITIONING", "Model": "MODEL",
             "Clip": "CLIP", "Vae": "VAE", "Sigmas": "SIGMAS", "Sampler": "SAMPLER", "Noise": "NOISE",
             "Guider": "GUIDER", "ControlNet": "CONTROL_NET", "ClipVision": "CLIP_VISION", "StyleModel": "STYLE_MODEL",
             "ClipVisionOutput": "CLIP_VISION_OUTPUT", "Int": "INT", "Float": "FLOAT", "String": "STRING",
             "Boolean": "BOOLEAN", "Combo": "COMBO", "AnyType": "*"}
    for name, io_type in names.items():
        kind = getattr(io, name)
        assert kind.Input("x").io_type == io_type
        assert kind.Output().io_type == io_type
    assert io.Custom("LORA_STACK").Input("stack").io_type == "LORA_STACK"
    assert io.Image.Input("x").io_type == "IMAGE", "a later Custom must not change an earlier type"


def test_unknown_type_is_told_where_the_node_is_defined():
    with pytest.raises(AttributeError, match=r"io\.Webcam is not known .* Conditioning, .* Vae") as caught:
        _ = io.Webcam.Input("x")
    assert "NoReturn" not in str(caught.value)
    assert not hasattr(io, "Autogrow"), "feature tests must keep working"


def test_schema_is_normalised_as_in_core():
    schema = io.Schema(node_id="x", inputs=None, outputs=[io.Image.Output(), io.Mask.Output("alpha")],  # type: ignore
                       is_output_node=True, hidden=[io.Hidden.prompt])
    schema.finalize()
    assert schema.inputs == []
    assert [output.id for output in schema.outputs] == ["_0_IMAGE_", "alpha"]
    assert schema.hidden == [io.Hidden.prompt, io.Hidden.extra_pnginfo]


@pytest.mark.parametrize(("inputs", "outputs", "message"), [
    ([io.Int.Input("a"), io.Float.Input("a")], [], "used twice.*: a"),
    ([io.Int.Input("a")], [io.Int.Output("a")], "used twice.*: a"),
    ([io.Int.Output("a")], [], "no Input"),
    ([], [io.Int.Input("a")], "no Output"),
])
def test_schema_mistakes_are_refused(inputs, outputs, message):
    class Bad(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Bad", inputs=inputs, outputs=outputs)

    with pytest.raises(ValueError, match=message):
        Bad.GET_SCHEMA()


def test_calls_run_on_a_locked_clone():
    class Keeps(io.ComfyNode):
        @classmethod
        def execute(cls) -> io.NodeOutput:
            cls.state = 1  # type: ignore[attr-defined]
            return io.NodeOutput()

    with pytest.raises(AttributeError, match="no state between calls"):
        Keeps.call("execute", io.HiddenHolder(), {})
    assert not hasattr(Keeps, "state")


def test_hidden_is_there_only_during_the_call():
    output = Echo.call("execute", io.HiddenHolder(unique_id="57:3"), {"text": "hello"})
    assert output.result == ("hello", "57:3")
    assert output[1] == "57:3"
    assert Echo.hidden.unique_id is None
    assert Echo.hidden.no_such_name is None


def test_coroutines_are_awaited():
    class Later(io.ComfyNode):
        @classmethod
        async def execute(cls, x: int) -> io.NodeOutput:
            return io.NodeOutput(x + 1)

    assert Later.call("execute", io.HiddenHolder(), {"x": 1}).result == (2,)


def test_combo_takes_an_enum():
    spec = io.Combo.Input("folder", options=io.FolderType, default=io.FolderType.output)
    assert list(spec.options) == ["input", "output", "temp"]  # type: ignore[arg-type]
    assert spec.default == "output"
