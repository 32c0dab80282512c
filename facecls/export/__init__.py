"""A trained model as one ONNX file: the graph, its trunk in 8 bits, and whether it still says the same."""
