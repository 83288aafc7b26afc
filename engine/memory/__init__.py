"""What a run needs and where it fits: estimates from headers, the plan, and weights on their way to the device."""

from . import activations
from .activations import Activations, estimate
from .machine import Device, TorchDevice, device_free, device_total, host_free
from .placing import PinnedCopies, Placed, watched
from .plan import MODES, Plan, Stage, joined, plan, plan_stage
from .weights import TABLE_SHARE, PartWeights, estimate_weights, held_dtype, part_weights, weights_of

__all__ = ["MODES", "TABLE_SHARE", "Activations", "Device", "PartWeights", "PinnedCopies", "Placed", "Plan", "Stage",
           "TorchDevice", "activations", "device_free", "device_total", "estimate", "estimate_weights", "held_dtype",
           "host_free", "joined", "part_weights", "plan", "plan_stage", "watched", "weights_of"]
