"""Models for other libraries."""

FORMATS = ("openclip", "huggingface", "safetensors", "onnx")
