from __future__ import annotations

from typing import Any

import pytest
from family_fixtures import *  # noqa: F403 - fixtures shared by several folders of tests
from flux_kit.hosts.standalone.host import StandaloneHost


@pytest.fixture
def nodes(host: StandaloneHost) -> dict[str, Any]:
    """Node id -> a call of it, which gives its outputs."""
    from flux_kit.nodes import NODES

    def call(kind: Any) -> Any:
        return lambda **inputs: kind.execute(**inputs).args

    return {kind.GET_SCHEMA().node_id: call(kind) for kind in NODES}


@pytest.fixture
def vae(host: StandaloneHost) -> Any:
    return host.load_vae(host.resolve_file("vae", "ae.safetensors"))
