"""Test the page in a browser without a network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_cfg import CFGPipeline
from diffusers_cfg.export import graph, page
from diffusers_cfg.export.export import export_model
from diffusers_cfg.export.settings import ExportConfig
from tests.export.test_export import small
from tests.support.browser import open_browser
from tests.support.runs import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.slow]
DIST = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules" / "onnxruntime-web" / "dist"))


@pytest.fixture(scope="module")
def pipeline() -> CFGPipeline:
    """Return a pipeline whose images depend on the class and on w."""
    return small()


def export_page(pipeline: CFGPipeline, folder: Path, **settings) -> Path:
    """Export a page, and return it."""
    pipeline.save_pretrained(folder / "tiny")
    config = ExportConfig(model=str(folder / "tiny"), output_dir=str(folder / "page"), batch_size=6, **settings)
    return export_model(config)[0]


def wait_for(browser, condition: str) -> None:
    """Wait until a JavaScript expression is true."""
    wait = pytest.importorskip("selenium.webdriver.support.ui", reason="selenium is not installed")
    wait.WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(f"return {condition}"))


def picture(browser) -> str:
    """Return what the canvas shows, when nothing is left to draw."""
    wait_for(browser, "document.querySelector('canvas').dataset.drawn && document.querySelector('progress').hidden")
    return browser.execute_script("return document.querySelector('canvas').toDataURL()")


def test_the_page_draws_the_images_of_the_pipeline(pipeline, tmp_path):
    if not DIST.is_dir():
        pytest.skip(f"no onnxruntime-web in {DIST}. Run npm install onnxruntime-web@{page.VERSION}")
    keys = pytest.importorskip("selenium.webdriver.common.keys", reason="selenium is not installed").Keys
    path = export_page(pipeline, tmp_path, onnxruntime_web=str(DIST))
    noise = torch.randn(6, *pipeline.sample_shape, generator=torch.Generator().manual_seed(0))
    with open_browser(tmp_path / "profile") as browser:
        browser.get(path.as_uri())
        first = picture(browser)
        for label, w, steps in ((0, 0.0, 4), (1, -1.0, 4), (2, 2.5, 4), (2, 4.0, 8)):
            script = (
                "const [noise, label, w, steps, done] = arguments;"
                "sample(Float32Array.from(noise), label, w, steps).then((images) => done(Array.from(images)))"
            )
            found = browser.execute_async_script(script, noise.flatten().tolist(), label, w, steps)
            call = {"guidance_scale": w, "num_inference_steps": steps, "latents": noise, "output_type": "latent"}
            expected = pipeline([label] * 6, **call).images
            difference = np.abs(np.reshape(found, expected.shape) - expected.numpy()).max()
            assert difference < 1e-3, (label, w, steps)  # in [-1, 1]

        # As a person does
        slider, seed = browser.find_element("id", "w"), browser.find_element("id", "seed")
        assert browser.find_element("css selector", "label[for=w]").text == "w (s = 1 + w)"
        slider.send_keys(keys.END)
        guided = picture(browser)
        assert browser.find_element("id", "scale").text == "w = 4.0, s = 5.0"
        slider.send_keys(keys.HOME)
        unconditional = picture(browser)
        button = browser.find_element("xpath", "//button[text()='two']")
        button.click()
        assert picture(browser) == unconditional  # which no class changes
        slider.send_keys(keys.END)
        other_class = picture(browser)
        assert button.get_attribute("aria-pressed") == "true"
        browser.find_element("xpath", "//button[text()='Next']").click()
        other_seed = picture(browser)
        browser.find_element("css selector", "#steps option[value='16']").click()
        more_steps = picture(browser)
        assert len({first, guided, unconditional, other_class, other_seed, more_steps}) == 6
        seed.clear()
        seed.send_keys("0")
        browser.find_element("css selector", "#steps option[value='4']").click()
        assert picture(browser) == other_class  # a seed repeats its images
        assert "6 images of two, w = 4, 4 steps, seed 0" in browser.find_element("tag name", "canvas").get_attribute(
            "aria-label"
        )
        assert browser.get_log("browser") == []


def test_a_page_without_the_runtime_says_that_it_needs_a_network(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "export_graph", lambda *_: b"never read")
    monkeypatch.setattr(graph, "check_graph", lambda *_: 0.0)
    path = export_page(pipeline, tmp_path)
    with open_browser(tmp_path / "profile") as browser:
        browser.get(path.as_uri())
        wait_for(browser, "document.querySelector('#status').className === 'error'")
        assert "cannot be loaded" in browser.find_element("id", "status").text
