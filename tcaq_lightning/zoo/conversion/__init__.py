"""Published checkpoints in their original files, converted to diffusers directories."""
