"""Test the command sample.py. Sampling itself is tested in tests/evaluation."""

import pytest

from diffusers_cfg.config import UserError
from tests.support.commands import load_command
from tests.support.models import make_pipeline


def test_command_writes_images(tmp_path, capsys):
    main = load_command("sample").main
    make_pipeline().save_pretrained(tmp_path / "model")
    folders = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "images")]
    main([*folders, "--num_samples", "2", "--num_inference_steps", "2", "--class_labels", "two", "-1"])
    assert sorted(path.parent.name for path in (tmp_path / "images").rglob("*.png")) == ["two", "unconditional"]
    assert capsys.readouterr().out.endswith(f"Wrote 2 images to {tmp_path / 'images'}.\n")
    with pytest.raises(UserError, match="is not empty. Choose a different folder"):
        main(folders)
