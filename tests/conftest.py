"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Oracles must never go to the network, whatever they are asked for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# Time limits per example would make tests depend on how busy the machine is.
settings.register_profile("flux_kit", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flux_kit")
