"""Declare the settings of `export.py`."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from diffusers_cfg.config import UserError, flag
from diffusers_cfg.evaluation.settings import SavedModelConfig

# The packages of the extra `export`
PACKAGES = ("onnxruntime", "onnxscript")
FILES = {"onnx": ("model.onnx", "sampling.json"), "html": ("index.html",)}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SavedModelConfig):
    """The settings of `export.py`."""

    description: ClassVar[str] = "Export a model to ONNX, or to a static page that samples in the browser."
    group = "export"

    format: Literal["onnx", "html"] = flag(
        "html",
        "html: index.html, a page that samples in the browser. onnx: model.onnx, the guided prediction as a graph, and "
        "sampling.json, which describes its inputs and the sampler.",
    )
    output_dir: str = flag("exported", "Output folder.")
    batch_size: int = flag(16, "Number of images of a batch, which a graph fixes.", at_least=1, at_most=1024)
    num_inference_steps: list[int] | None = flag(
        None,
        "Numbers of sampling steps to offer, the one to start with first; defaults to the model's own, and half, twice "
        "and four times as many.",
        at_least=1,
        at_most=250,
    )
    scheduler: str | None = flag(
        None, "A scheduler class of diffusers that draws no noise between steps; defaults to the model's own."
    )
    onnxruntime_web: str | None = flag(
        None,
        "The folder dist of the npm package onnxruntime-web, to embed it in the page, which then needs no network. By "
        "default the page loads the package from a CDN.",
    )
    seed: int = flag(0, "Seed that the page starts with, and of the inputs that test the graph.", at_least=0)

    @property
    def outputs(self) -> list[Path]:
        """The files that the command writes."""
        return [Path(self.output_dir, name) for name in FILES[self.format]]

    def check(self) -> None:
        steps = self.num_inference_steps or []
        if len(set(steps)) < len(steps):
            raise UserError(f"num_inference_steps must not repeat a value, but is {steps}.")
        if self.onnxruntime_web is not None and self.format != "html":
            raise UserError("--onnxruntime_web is embedded in a page. Leave it out, or pass --format html.")


def check_environment(config: ExportConfig) -> None:
    """
    Check what the export needs, before a model is loaded.

    Raises:
        UserError: if a package of the extra `export` is missing, or the output exists.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f'{" and ".join(missing)} not installed. Run pip install "diffusers-cfg[export]".')
    if existing := [str(path) for path in config.outputs if path.exists() or path.is_symlink()]:
        raise UserError(f"{' and '.join(existing)} would be overwritten. Delete it, or pass another --output_dir.")
