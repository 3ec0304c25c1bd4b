"""The ONNX graph of a frozen denoiser."""
