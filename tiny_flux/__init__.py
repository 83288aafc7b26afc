"""tiny-flux: a real Flux family in miniature, its data, training and scoring. See `tiny_flux/README.md`."""
