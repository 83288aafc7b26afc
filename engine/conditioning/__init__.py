"""What FLUX.1 can be conditioned on beside its prompt, as pure tensor maths: pictures and masks in, slots out."""
