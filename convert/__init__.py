"""Keras VGGFace2 ResNet-50 -> ONNX -> PyTorch trunk; run once."""
