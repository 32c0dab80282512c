"""Converts a Keras VGGFace2 ResNet-50 to ONNX and to a PyTorch trunk, once."""
