"""Test the model card: its sections, its metadata, and the text of the author."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import yaml
from diffusers.guiders import AdaptiveProjectedGuidance
from PIL import Image

import diffusers_cfg.model_card_sections
from diffusers_cfg import LogSNRScheduler
from diffusers_cfg.model_card import BEGIN, END, model_card
from diffusers_cfg.model_card_sections import package_link
from tests.support.models import ddgan, make_pipeline, make_unet

RUN = {
    "dataset": "someone/scribbles",
    "dataset_id": "someone/scribbles",
    "num_images": 100,
    "num_parameters": 1_500_000,
    "steps": 7,
    "batch_size": 64,
    "learning_rate": 0.001,
    "seconds": 600,
    "hardware": "2 × CPU",
    "license": "mit",
    "base_model": "someone/older",
    "seed": 0,
    "ema": 0.9999,
    "command": "python training/train_cfg.py --dataset_name someone/scribbles",
    "config": {"seed": 0},
    "versions": {"diffusers-cfg": "0.1.0", "diffusers": "0.42.1", "torch": "2.13.0"},
}
EVALUATION = {
    "num_samples": 1000,
    "feature_extractor": {"name": "small-0123"},
    "metric_names": {
        "frechet_distance": "Fréchet distance",
        "inception_score": "classifier score",
        "class_accuracy": "class accuracy",
    },
    "best": {"frechet_distance": 1.0, "class_accuracy": 1.0},
    "results": [
        {"guidance_scale": 0.5, "class_accuracy": 0.98, "frechet_distance": 1.0, "network_evaluations": 254.0},
        {"guidance_scale": 0.0, "class_accuracy": 0.975, "frechet_distance": 1.5, "network_evaluations": 127.0},
        {"guidance_scale": 1.0, "class_accuracy": 0.999, "frechet_distance": 0.25, "network_evaluations": 254.0},
    ],
}
TABLE = (
    "| w | Fréchet distance |\n| --- | --- |\n| 0 | 1.500 |\n| 1 | **0.250** |\n\n64 steps of HeunDiscreteScheduler\n"
)


def parse(card: str) -> tuple[dict, str]:
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.fixture
def folder(tmp_path):
    make_pipeline(conditioning_dropout_prob=0.1).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def full(folder):
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(EVALUATION))
    (folder / "evaluation" / "metrics.md").write_text(TABLE)
    for name in ("grid.png", "curves.png"):
        Image.new("L", (4, 4)).save(folder / "evaluation" / name)
    (folder / "samples").mkdir()
    Image.new("L", (4, 4)).save(folder / "samples" / "step-7.png")
    return folder


def test_card_of_an_evaluated_model(full):
    metadata, text = parse(model_card(full, "me/scribbles", pictured=[1, 2]))
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["someone/scribbles"]
    assert metadata["base_model"] == "someone/older"
    assert metadata["widget"] == [
        {"text": "zero"},
        {"text": "one", "output": {"url": "samples/class-1.png"}},
        {"text": "two", "output": {"url": "samples/class-2.png"}},
        {"text": "One row per class, one column per guidance scale w", "output": {"url": "samples.png"}},
        {
            "text": "One row per guidance scale w; each column uses the same noise",
            "output": {"url": "evaluation/grid.png"},
        },
    ]
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert len(metrics) == 4
    by_name = {metric["name"]: metric["value"] for metric in metrics}
    measured_with = "1000 samples, {} network evaluations, features of small-0123"
    assert by_name["class accuracy at w = 1, " + measured_with.format(254)] == 0.999
    assert by_name["Fréchet distance at w = 0, " + measured_with.format(127)] == 1.5
    assert {metric["type"] for metric in metrics} == {"class_accuracy", "frechet_distance"}
    for line in (
        "| 2 | two |",
        "| label dropout p_uncond | 0.1 |",
        "| training time | 10 min |",
        "| EMA decay | 0.9999 |",
        "| parameters | 1.5 M |",
        "| hardware | 2 × CPU |",
        "| 1 | **0.250** |",
        "64 steps of HeunDiscreteScheduler",
        "![One row per guidance scale w; each column uses the same noise](evaluation/grid.png)",
        "](evaluation/curves.png)",
        "s = 1 + w",
        "8×8 grayscale images of someone/scribbles, 3 classes",
        "![One row per class, one column per guidance scale w](samples.png)",
        "@article{ho2022classifier",
        'button "Use this model" leaves out `trust_remote_code=True`',
        "Trained with diffusers-cfg 0.1.0, diffusers 0.42.1 and torch 2.13.0:",
        "```bash\npython training/train_cfg.py --dataset_name someone/scribbles\n```",
        "[train_config.yaml](train_config.yaml) has all settings that affect the weights",
    ):
        assert line in text


def test_pipe_characters_in_class_names_are_escaped(tmp_path):
    make_pipeline(make_unet(), id2label={0: "a|b", 1: "c", 2: "d"}).save_pretrained(tmp_path)
    assert r"| 0 | a\|b |" in model_card(tmp_path, "me/scribbles")


def test_unknown_facts_are_omitted(folder):
    metadata, text = parse(model_card(folder, "me/scribbles"))
    assert set(metadata) == {"library_name", "pipeline_tag", "tags", "widget"}
    assert "None" not in text
    for heading in (
        "## Reproduce",
        "train_config.yaml",
        "## Results",
        "evaluation/",
        "samples.png",
        "| dataset |",
        "| hardware |",
        "| training time |",
    ):
        assert heading not in text


@pytest.mark.parametrize(
    ("num_classes", "absent", "expected"),
    [(3, [], ["c0", "c1", "c2"]), (3, [0], ["c1", "c2"]), (12, [1, 2], ["c0", *(f"c{i}" for i in range(3, 10))])],
)
def test_examples_are_the_first_classes_with_images(tmp_path, num_classes, absent, expected):
    names = {i: f"c{i}" for i in range(num_classes)}
    make_pipeline(make_unet(num_class_embeds=num_classes + 1), id2label=names).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"method": {"classes_without_images": absent}}))
    metadata, text = parse(model_card(tmp_path, "me/scribbles"))
    assert [entry["text"] for entry in metadata["widget"]] == expected
    assert f'class_labels=["{expected[0]}"]' in text


@pytest.mark.parametrize("content", ["[]", "null", "{", '"x"'])
def test_damaged_record_is_named(folder, content):
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json"):
        model_card(folder, "me/scribbles")


@pytest.mark.parametrize(
    "results", [[], 3, None, [{}], [{"conditional": None}], [{"diffusion_steps": 0, "null": {"bits_per_dim": "x"}}]]
)
def test_damaged_likelihood_is_named(folder, results):
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "likelihood.json").write_text(json.dumps({"results": results, "images": "training"}))
    with pytest.raises(ValueError, match="evaluation/likelihood.json is damaged.*Evaluate the model again"):
        model_card(folder, "me/scribbles")


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["Repository, https://example.org/cfg"], "[diffusers-cfg](https://example.org/cfg)"),
        (["Repository, /home/me/cfg"], "diffusers-cfg"),
        (None, "diffusers-cfg"),
    ],
)
def test_package_is_linked_if_it_has_an_address(monkeypatch, urls, expected):
    class Metadata:
        def get_all(self, name: str) -> list[str] | None:
            return urls

    monkeypatch.setattr(diffusers_cfg.model_card_sections, "metadata", lambda name: Metadata())
    assert package_link() == expected


def test_card_without_class_names_and_label_dropout(tmp_path):
    make_pipeline(make_unet(), id2label=None, conditioning_dropout_prob=0.0).save_pretrained(tmp_path)
    metadata, text = parse(model_card(tmp_path, "me/scribbles"))
    assert "## Classes" not in text
    assert "class_labels=[0]" in text
    assert "widget" not in metadata
    assert "cannot be guided" in text


def test_code_in_the_card_runs(folder, monkeypatch):
    """Use a local folder instead of a repository."""
    _, text = parse(model_card(folder, str(folder)))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block.replace("guidance_scale=1.0", "guidance_scale=1.0, num_inference_steps=2"), names)
        assert names["image"].size == (8, 8)


def test_authors_text_is_kept(folder, full):
    card = model_card(full, "me/scribbles")
    edited = card.replace(BEGIN, f"Read this first.\n\n{BEGIN}").replace(END, f"{END}\n\nAnd this last.")
    edited = edited.replace("license: mit", "license: mit\nlanguage: en")
    (full / "run.json").write_text(json.dumps({**RUN, "steps": 8}))
    again = model_card(full, "me/scribbles", edited)
    metadata, text = parse(again)
    assert metadata["language"] == "en"
    assert text.index("Read this first.") < text.index("| steps | 8 |") < text.index("And this last.")
    assert "| steps | 7 |" not in text
    assert model_card(full, "me/scribbles", again) == again
    # Cards from earlier versions, with different first markers
    for old in (
        "<!-- Written by diffusers-cfg, and written anew at the next push. Your own words belong below. -->",
        "<!-- Written by diffusers-cfg and replaced at the next push. Your own text belongs below the end mark. -->",
    ):
        assert model_card(full, "me/scribbles", again.replace(BEGIN, old)) == again
    assert END == "<!-- End of what diffusers-cfg writes. -->"


@pytest.mark.parametrize("own", ["# Title\n\nExisting text.\n", "---\nlicense: mit\n---\n\nExisting text.\n"])
def test_card_without_markers_is_kept_below_the_generated_text(folder, own):
    metadata, text = parse(model_card(folder, "me/scribbles", own))
    assert text.rstrip().endswith("Existing text.")
    assert metadata["library_name"] == "diffusers"
    assert ("license" in metadata) == ("license" in own)


def test_card_describes_a_student_and_its_sampler(tmp_path):
    scheduler = LogSNRScheduler(log_snr_min=-5.0, log_snr_max=13.08195, log_snr_schedule="linear")
    scheduler = scheduler.solver(diffusers.DDIMScheduler)
    pipeline = make_pipeline(make_unet(max_guidance_scale=3.0), scheduler, num_inference_steps=4)
    pipeline.save_pretrained(tmp_path)
    card = model_card(tmp_path, "me/student")
    assert "variational" not in card  # only its teacher minimised a bound
    assert "the paper's w, in 0 … 3. The model takes w as an input, and predicts" in card
    assert "| sampler | DDIMScheduler, 4 steps by default |" in card
    assert "| log-SNR λ | -5 … 13.08 |" in card


GAN = {"num_timesteps": 2, "latent_dim": 6, "loss": "non_saturating", "r1_gamma": 0.05, "lazy_reg": 15}
GAN = {**GAN, "learning_rate_discriminator": 0.002}


def gan_card(folder: Path, *argv: str, **method: object) -> tuple[dict, str]:
    """Return the card of a denoising diffusion GAN, by flags of train_ddgan.py and facts of the method."""
    ddgan(*argv).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({**RUN, "method": {**GAN, **method}}))
    (folder / "samples").mkdir(exist_ok=True)
    Image.new("L", (4, 4)).save(folder / "samples" / "step-7.png")
    return parse(model_card(folder, str(folder)))


def test_card_of_a_generator(tmp_path):
    metadata, text = gan_card(tmp_path)
    assert "denoising-diffusion-gan" in metadata["tags"]
    assert "classifier-free-guidance" not in metadata["tags"]
    assert metadata["widget"][-1]["text"] == "One row per class, columns of different noise"
    for line in (
        "A class-conditional [denoising diffusion GAN](https://arxiv.org/abs/2112.07804) of 8×8 grayscale images of "
        "someone/scribbles, 10 classes, trained with ",
        "![One row per class, columns of different noise](samples.png)",
        'pipe(class_labels=["zero"]).images[0]',
        "An image takes 2 evaluations, one per step, of the generator",
        "`guidance_scale`, w, is 0 by default",
        "can raise the class accuracy, and lowers the fidelity",
        "| denoising steps T | 2 |",
        "| latent dimension | 6 |",
        "| loss | non-saturating |",
        "| penalty | R1, γ = 0.05, every 15 steps |",
        "| peak learning rate | 0.001, discriminator 0.002 |",
        "| sampler | DDPMScheduler, 2 steps |",
        "it may leave out some of the variety of that data",
        "@inproceedings{xiao2022tackling",
    ):
        assert line in text
    for words in ("guidance_scale=", "log-SNR", "s = 1 + w", "A larger w", "by default |", "variational", "None"):
        assert words not in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["image"].size == (8, 8)


@pytest.mark.parametrize(
    ("argv", "method", "lines", "absent"),
    [
        (
            ["--num_timesteps", "1"],
            {"lazy_reg": 1},
            ["An image takes one evaluation of", "every step |"],
            "evaluations, ",
        ),
        ([], {"r1_gamma": 0.0}, [], "| penalty |"),
        ([], {"loss": "relativistic"}, ["| loss | relativistic |", "| penalty | R1 and R2, γ = 0.05"], "saturating"),
        (["--latent_dim", "0"], {}, ["| latent dimension | 0 |"], "None"),
        (
            ["--conditioning_dropout_prob", "0"],
            {},
            ["without label dropout and cannot be guided. Use 0."],
            "extrapolate",
        ),
    ],
)
def test_card_of_other_generators(tmp_path, argv, method, lines, absent):
    _, text = gan_card(tmp_path, *argv, **method)
    assert all(line in text for line in lines)
    assert absent not in text


def test_card_of_a_generator_without_labels(tmp_path):
    """The network has one class, which never occurred."""
    gan = ddgan()
    make_pipeline(
        make_unet(num_class_embeds=2, latent_dim=6), gan.scheduler, id2label={}, conditioning_dropout_prob=1.0
    ).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "method": {**GAN, "classes_without_images": [0]}}))
    metadata, text = parse(model_card(tmp_path, "me/stacks"))
    assert "widget" not in metadata
    assert "class-conditional" not in metadata["tags"]
    for line in (
        "An unconditional [denoising diffusion GAN](https://arxiv.org/abs/2112.07804) of 8×8 grayscale images of "
        "someone/scribbles, trained with",
        "pipe(class_labels=[-1]).images[0]",
        "It was trained without labels: pass `class_labels=-1`, the null class.",
    ):
        assert line in text
    for words in ("guidance_scale", "## Classes", "1 classes"):
        assert words not in text


def test_card_describes_guider_and_guide_unet(pipeline, tmp_path):
    pipeline.guide_unet = make_unet()
    pipeline.save_pretrained(tmp_path / "guide")
    _, text = parse(model_card(tmp_path / "guide", "me/scribbles"))
    assert "second, weaker network in `guide_unet`" in text
    assert "guidance_scale=1.0" in text
    pipeline.guide_unet, pipeline.guider = None, AdaptiveProjectedGuidance()
    pipeline.save_pretrained(tmp_path / "guider")
    _, text = parse(model_card(tmp_path / "guider", "me/scribbles"))
    assert "diffusers' `AdaptiveProjectedGuidance`" in text
    assert "guide_unet" not in text
    assert "guidance_scale=1.0" not in text  # the pipeline refuses it with a guider
