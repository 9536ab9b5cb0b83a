"""Export a model to ONNX, and to a static page that samples in the browser."""
