"""
Show a pipeline in a web page, with Gradio.

A Gradio Space contains a copy of this folder, so it imports nothing of the rest of this package.
"""
