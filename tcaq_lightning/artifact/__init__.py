"""The quantized model on disk, and as diffusers sees it."""
