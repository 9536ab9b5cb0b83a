"""Test the page of the demo in a browser, and what it needs to start."""

import base64
import io
import socket

import numpy as np
import pytest
from PIL import Image

from diffusers_cfg.demo.generation import Demo, Request, code_of, generate
from diffusers_cfg.demo.page import GALLERY_SIZE, check_gradio, check_port, enlarged, launch
from tests.support.browser import open_browser
from tests.support.models import make_pipeline

# Reads the files of the pictures, which the browser may show in another size.
READ_PICTURES = """
const done = arguments[arguments.length - 1];
const read = async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
};
Promise.all([...document.querySelectorAll("#images .thumbnail-lg img")].map(read)).then(done);
"""


def test_pictures_are_enlarged_by_whole_factors():
    image = Image.fromarray(np.arange(8 * 6, dtype=np.uint8).reshape(8, 6))
    large = enlarged(image)
    assert large.size == (6 * 20, 8 * 20)
    assert (np.asarray(large)[::20, ::20] == np.asarray(image)).all()
    assert len(set(large.crop((0, 0, 20, 20)).tobytes())) == 1
    huge = Image.new("RGB", (GALLERY_SIZE + 1, 4))
    assert enlarged(huge).size == huge.size


def test_missing_gradio_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "diffusers-cfg\[demo\]"'):
        check_gradio()


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"Port {port} cannot be used .* or choose another port"):
            check_port(port)
    check_port(port)


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_shows_the_images_of_the_pipeline(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    by = pytest.importorskip("selenium.webdriver.common.by", reason="selenium is not installed").By
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    pipeline = make_pipeline(num_inference_steps=3)
    pipeline.save_pretrained(tmp_path / "model")
    demo = Demo(pipeline, str(tmp_path / "model"))
    page = launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        with open_browser(tmp_path / "profile") as browser:
            waiting = wait(browser, 60)
            browser.get(page.local_url)
            button = waiting.until(lambda browser: browser.find_element(by.ID, "generate"))
            assert "w (s = 1 + w)" in browser.find_element(by.ID, "w").text
            assert not browser.find_elements(by.ID, "classifier")  # which this model does not have

            # Choose a second class, a w and a seed, as a visitor does
            classes = browser.find_element(by.CSS_SELECTOR, "#classes input")
            classes.click()
            option = "//ul[@role='listbox']/li[contains(., 'two')]"
            waiting.until(lambda browser: browser.find_element(by.XPATH, option)).click()
            for name, value in (("w", "2.5"), ("seed", "7")):
                field = browser.find_element(by.CSS_SELECTOR, f"#{name} input[type=number]")
                browser.execute_script("arguments[0].select()", field)
                field.send_keys(value + "\t")
            button.click()
            waiting.until(lambda browser: len(browser.find_elements(by.CSS_SELECTOR, "#images .thumbnail-lg img")) == 8)
            pictures = [
                Image.open(io.BytesIO(base64.b64decode(data))) for data in browser.execute_async_script(READ_PICTURES)
            ]

            request = Request([0, 2], guidance_scale=2.5, num_inference_steps=3, seed=7, num_images=4)
            images, captions = generate(demo, request)
            for picture, image in zip(pictures, images, strict=True):
                assert (np.asarray(picture.convert("L")) == np.asarray(enlarged(image))).all()
            assert [
                label.text for label in browser.find_elements(by.CSS_SELECTOR, "#images .caption-label")
            ] == captions
            lines = browser.find_elements(by.CSS_SELECTOR, "#code .cm-line")
            assert [line.text for line in lines] == code_of(demo, request).split("\n")

            # A wrong value is explained on the page
            remove = browser.find_elements(by.CSS_SELECTOR, "#classes .token-remove")
            remove[-1].click()
            button.click()
            error = waiting.until(lambda browser: browser.find_element(by.CSS_SELECTOR, "[data-testid=toast-body]"))
            assert "No class is chosen. Choose at least one." in error.text
            assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        page.close()
