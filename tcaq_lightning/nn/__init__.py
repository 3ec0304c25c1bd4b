"""Quantized layers and attention, and the pass that puts them into a denoiser."""
