"""Test the command demo.py. The page is tested in tests/demo."""

import socket
from types import SimpleNamespace

import pytest

from diffusers_cfg.config import UserError
from tests.support.commands import load_command
from tests.support.models import make_pipeline, make_unet


@pytest.fixture
def main(monkeypatch):
    """Return the command, which must not reach Gradio."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("diffusers_cfg.demo.page.launch", lambda *_, **__: pytest.fail("a page was opened"))
    return load_command("demo").main


def test_the_page_of_a_model_is_opened(main, tmp_path, monkeypatch, capsys):
    opened = []

    def fake_launch(demo, **settings):
        opened.append((demo, settings))
        return SimpleNamespace(local_url="http://127.0.0.1:7860/", block_thread=lambda: opened.append("blocked"))

    monkeypatch.setattr("diffusers_cfg.demo.page.launch", fake_launch)
    make_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "run.json").write_text('{"method": {"classes_without_images": [0]}}')
    main(["--model", str(tmp_path / "model")])
    (demo, settings), blocked = opened
    assert demo.source == str(tmp_path / "model")
    assert 0 not in demo.classes
    assert settings["server_port"] is None
    assert blocked == "blocked"  # until Ctrl-C
    assert "Open http://127.0.0.1:7860/ in a browser." in capsys.readouterr().out


def test_what_cannot_be_shown_is_refused(main, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        main(["--model", str(tmp_path / "nowhere")])
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="photos"):
        main(["--model", str(tmp_path / "photos")])
    make_pipeline(make_unet(in_channels=4, out_channels=4)).save_pretrained(tmp_path / "latents")
    with pytest.raises(UserError, match="samples of 4 channels"):
        main(["--model", str(tmp_path / "latents")])


def test_a_port_in_use_is_refused_before_the_model_is_loaded(main, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with pytest.raises(UserError, match=f"Port {port} cannot be used"):
            main(["--model", str(tmp_path / "nowhere"), "--port", port])
    with pytest.raises(UserError, match="Port 99999 is not"):
        main(["--model", str(tmp_path / "nowhere"), "--port", "99999"])


def test_missing_gradio_is_refused_before_the_model_is_loaded(main, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "diffusers-cfg\[demo\]"'):
        main(["--model", str(tmp_path / "nowhere")])
