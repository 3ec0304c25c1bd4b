"""Every denoiser that diffusers has, as a tiny model: what of it is quantized, and what is not."""
