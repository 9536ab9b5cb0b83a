"""Test that the preset for a folder of pictures combines with one's own data and flags."""

import re

import pytest

from tests.support.commands import load_command
from tests.support.images import save_images
from tests.support.runs import TRAINING, reset_accelerate

PRESET = str(TRAINING / "configs" / "photos64.yaml")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return save_images(tmp_path_factory.mktemp("photos") / "photos", ["cat", "dog"], "RGB", size=70, n=80)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], [r"samples +3×64×64", r"steps +675 of 64 images", r"unet +39\.6 M parameters"]),
        (["--resolution", "32"], [r"samples +3×32×32", r"steps +675 of 64 images"]),
        (["--max_train_steps", "7", "--train_batch_size", "9"], [r"steps +7 of 9 images"]),
    ],
)
def test_preset_and_own_folder_combine(photos, tmp_path, capsys, monkeypatch, argv, shown):
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    load_command("train_cfg").main(["--config", PRESET, "--train_data_dir", photos, "--dry_run", *argv])
    plan = capsys.readouterr().out
    for line in (r"images +144 of 2 classes", *shown):  # a tenth of the 160 images is held out
        assert re.search(line, plan), plan
    assert list(tmp_path.iterdir()) == []
