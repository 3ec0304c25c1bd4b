"""Export of the frozen denoiser to integer graphs, and the engines that run them."""
