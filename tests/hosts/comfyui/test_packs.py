"""What widespread packs do to the network of a MODEL (`stand_ins`, loaded beside ours), on ours and on core's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_server import Failed, Server
from compare import relative
from prompts import Prompt, core, core_loader, node

SAME = 1e-5
# pack -> (inputs that make it do nothing, inputs that make it do much)
PACKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StepCache": ({"threshold": 0.0}, {"threshold": 0.2}),
    "FirstBlockCache": ({"threshold": 0.0}, {"threshold": 1.0}),
    "Identity": ({"weight": 0.0}, {"weight": 0.5}),
    "Processors": ({"strength": 0.0}, {"strength": 0.3}),
}
SIGNED = ("StepCache", "Identity")
STEPS = 8


def through(pack: str, inputs: dict[str, Any], signature: str = "newer") -> Prompt:
    prompt = core(steps=STEPS)
    signed = {"signature": signature} if pack in SIGNED else {}
    prompt["pack"] = node(f"StandIn{pack}", model=["load", 0], **inputs, **signed)
    prompt["sampler"]["inputs"]["model"] = ["pack", 0]
    return prompt


@pytest.fixture(autouse=True)
def loaded_anew(server: Server) -> Iterator[None]:
    """For the tests that follow: a pack may have left the network of a cached MODEL changed."""
    yield
    server.forget()


def latent(server: Server, prompt: Prompt) -> torch.Tensor:
    """Of a prompt on models loaded anew: some packs leave the network changed."""
    server.forget()
    return server.latents(prompt)["latent"]


@pytest.mark.parametrize("pack", PACKS)
def test_a_pack_that_does_nothing_changes_nothing(server: Server, pack: str) -> None:
    plain = latent(server, core(steps=STEPS))
    assert relative(latent(server, through(pack, PACKS[pack][0])), plain) <= SAME
    assert torch.equal(latent(server, core(steps=STEPS)), plain)


@pytest.mark.parametrize("pack", PACKS)
def test_a_pack_does_to_ours_what_it_does_to_core_s(server: Server, core_can_load: bool, pack: str) -> None:
    prompt = through(pack, PACKS[pack][1])
    ours = latent(server, prompt)
    assert torch.isfinite(ours).all()
    assert relative(ours, latent(server, core(steps=STEPS))) > 1e-3, "the pack did nothing"
    if core_can_load:
        assert relative(ours, latent(server, core_loader(prompt))) <= SAME


@pytest.mark.parametrize("pack", SIGNED)
def test_the_classic_signature_is_enough(server: Server, core_can_load: bool, pack: str) -> None:
    """Newer hosts hand their own network's `forward_orig` an argument that BFL's has not; ours never does."""
    classic = through(pack, PACKS[pack][1], "classic")
    assert torch.equal(latent(server, classic), latent(server, through(pack, PACKS[pack][1])))
    if core_can_load:
        try:
            theirs = latent(server, core_loader(classic))
        except Failed as failed:
            assert "unexpected keyword" in str(failed)
        else:
            assert relative(latent(server, classic), theirs) <= SAME
