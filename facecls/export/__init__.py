"""A trained model as one ONNX file: building the graph, quantising its trunk, and verifying it against torch."""
