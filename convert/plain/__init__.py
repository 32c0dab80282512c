"""Plain ONNX models, the form to which every source is brought."""
