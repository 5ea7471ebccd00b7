"""Writing models: packed or float safetensors with a model card, ONNX."""
