"""FLUX.1's networks, named as in the published checkpoints. They know nothing of quantisation, LoRA or offloading."""
