"""Make a static page that samples a model in the browser, with onnxruntime-web."""

import base64
import gzip
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers_cfg.config import UserError

VERSION = "1.30.0"
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist"
# The build for WebAssembly alone, and the checksums of its files, which browsers verify (Subresource Integrity).
RUNTIME = {
    "script": (
        "ort.wasm.bundle.min.mjs",
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    ),
    "wasm": (
        "ort-wasm-simd-threaded.wasm",
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    ),
}
# Browsers limit the length of a string in the page to about 512 MiB, of which base64 needs 4/3.
MAX_BYTES = 256 * 2**20


def runtime_files(folder: str | None) -> dict[str, dict[str, str]]:
    """
    Return where the page finds the files of onnxruntime-web: in itself, or by default on a CDN.

    Args:
        folder (`str`, *optional*): the folder dist of the npm package, whose files are embedded.

    Raises:
        UserError: if the folder lacks a file, or has another version of it.
    """
    if folder is None:
        return {name: {"url": f"{CDN}/{file}", "integrity": integrity} for name, (file, integrity) in RUNTIME.items()}
    embedded = {}
    for name, (file, integrity) in RUNTIME.items():
        path = Path(folder, file)
        hint = f"Pass the folder dist of the npm package onnxruntime-web {VERSION}: npm pack onnxruntime-web@{VERSION}"
        if not path.is_file():
            raise UserError(f"--onnxruntime_web {folder} has no {file}. {hint}")
        content = path.read_bytes()
        found = "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()
        if found != integrity:
            raise UserError(f"--onnxruntime_web: {path} is damaged, or of another version. {hint}")
        embedded[name] = embed(content)
    return embedded


def embed(content: bytes) -> dict[str, str]:
    """Return a file for the page: gzip, which browsers unpack, in base64."""
    return {"base64": base64.b64encode(gzip.compress(content, mtime=0)).decode()}


def make_page(data: dict[str, Any]) -> str:
    """
    Return the page.

    Args:
        data (`dict`): what `page.html` reads: the description of the sampler, `model` and `runtime`.
    """
    template = files("diffusers_cfg.export").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, after = template.split("DATA</script>")
    return f"{before}{text}</script>{after}"
