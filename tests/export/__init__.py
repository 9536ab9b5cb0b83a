"""Test the export to ONNX and to a page."""
