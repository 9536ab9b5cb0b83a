"""Test guidance-free training: networks that learn to guide in one pass, without a teacher."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_cfg import CFGPipeline, UNet2DCFGModel
from diffusers_cfg.config import UserError, parse_config
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.method import Batch
from diffusers_cfg.method_settings import CFGConfig, VDMConfig
from diffusers_cfg.methods.cfg import ClassifierFreeGuidance
from diffusers_cfg.methods.networks import build_unet
from diffusers_cfg.model_card import model_card
from diffusers_cfg.randomness import Draws
from tests.support.runs import TINY, train
from tests.support.trajectories import TEACHER

ONE_PASS = ["--max_guidance_scale", "4"]


def make_method(*argv: str) -> ClassifierFreeGuidance:
    """Return a method for the digits whose network depends on w."""
    method = ClassifierFreeGuidance.build(parse_config(CFGConfig, [*TINY, *ONE_PASS, *argv]), Digits())
    torch.nn.init.normal_(method.pipeline.unet.guidance_embedding.linear_2.weight, std=0.1)
    return method


def make_batch(rows: range = range(12), step: int = 3) -> Batch:
    """Return rows of a batch of 12 digits, of which two have no label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1])
    index = list(rows)
    return Batch(x[index], labels[index], Draws(0, step, rows, 12), step)


def test_loss_is_that_of_the_prediction_that_the_network_implies():
    """Compare the loss and its gradient with equation 8 of Chen et al., evaluated with two whole passes."""
    method, batch = make_method("--conditioning_dropout_prob", "0.3"), make_batch()
    unet, scheduler, draws = method.pipeline.unet, method.scheduler, batch.draws
    loss = method.loss({"unet": unet}, batch).loss
    loss.mean().backward()
    gradient = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()

    u, noise = draws.uniform("time"), draws.normal("noise", 1, 8, 8)
    c = torch.where((draws.uniform("dropout") < 0.3) | (batch.class_labels < 0), 10, batch.class_labels)
    w = 4 * draws.uniform("guidance scale") ** 2
    w[[row for row in range(12) if c[row] == 10 or (3 + row) % 5 == 0]] = 0
    assert 2 < (w == 0).sum() < 10
    t = scheduler.timestep(u)
    z = scheduler.add_noise(batch.x, noise, t)
    cond, null = (
        unet(z, t, labels, guidance_scale=s).sample for labels, s in ((c, w), (torch.full_like(c, 10), 0 * w))
    )
    beta = (1 / (1 + w)).view(-1, 1, 1, 1)
    target = scheduler.get_velocity(batch.x, noise, t)
    expected = (beta * cond + (1 - beta) * null.detach() - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.mean().backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1, 5])
def test_loss_does_not_depend_on_the_division_of_the_batch(size):
    method = make_method()
    networks = {"unet": method.pipeline.unet}
    whole = method.loss(networks, make_batch()).loss
    parts = [method.loss(networks, make_batch(range(i, min(i + size, 12)))).loss for i in range(0, 12, size)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_one_image_in_five_is_trained_without_guidance():
    """Also if a batch has a single image."""
    method = make_method("--conditioning_dropout_prob", "0.001")
    unguided, forward = [], method.pipeline.unet.forward
    calls: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, z, t, class_labels, guidance_scale):
            calls.append(guidance_scale)
            return forward(z, t, class_labels=class_labels, guidance_scale=guidance_scale)

    for step in range(10):
        calls.clear()
        method.loss({"unet": Spy()}, make_batch(range(step, step + 1), step=7 + step))
        unguided.append(float(calls[0]) == 0)
        assert len(calls) == 2 - unguided[-1]  # no second pass at w = 0
    assert unguided == [(7 + 2 * step) % 5 == 0 for step in range(10)]
    counts = []
    for step in range(5):
        calls.clear()
        method.loss({"unet": Spy()}, make_batch(range(10), step))
        counts.append(int((calls[0] == 0).sum()))
    assert counts == [2] * 5


def test_the_minimum_is_the_guided_prediction():
    """Minimise the loss of a table with an entry for each class, at a single w. Its inputs carry no information."""
    method = make_method("--conditioning_dropout_prob", "0.5")
    table = torch.zeros(2, 2, requires_grad=True)  # entries of class and of ∅, at w = 0 and at w
    w = 3.0

    class Network(torch.nn.Module):
        def forward(self, z, t, class_labels, guidance_scale):
            entry = table[(class_labels == 10).long(), (guidance_scale > 0).long()]
            return SimpleNamespace(sample=entry.view(-1, 1, 1, 1).expand_as(z))

    method.max_guidance_scale, conditional, marginal = w, 2.0, 0.5
    optimizer = torch.optim.SGD([table], lr=1.0)
    is_null = torch.arange(12) < 6
    labels = torch.where(is_null, 10, 0)
    target = torch.where(is_null, marginal, conditional).view(-1, 1, 1, 1)
    for step in range(200):
        batch = make_batch(step=step)
        batch.draws.uniform = lambda *_: torch.ones(12)  # so that w is the largest
        pred = method.implied_prediction(Network(), batch, is_null, torch.zeros(12, 1, 1, 1), torch.zeros(12), labels)
        optimizer.zero_grad()
        (pred.sample - target).square().mean().backward()
        optimizer.step()
    assert table[0, 0].item() == pytest.approx(conditional, abs=0.02)
    assert table[0, 1].item() == pytest.approx((1 + w) * conditional - w * marginal, abs=0.05)
    assert table[1, 0].item() == pytest.approx(marginal, abs=0.02)


def test_saved_model_guides_in_one_pass(tmp_path, caplog):
    train(
        tmp_path / "out",
        "--max_train_steps",
        "1",
        "--max_guidance_scale",
        "3",
        "--validation_guidance_scales",
        "0",
        "4",
    )
    assert "The samples leave out w = [4.0]: the network learns 0 to 3." in caplog.text
    pipe = CFGPipeline.from_pretrained(tmp_path / "out")
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = pipe(["three", 7], [0.0, 3.0], output_type="pt").images
    assert images.isfinite().all()
    assert set(sizes) == {2}
    with pytest.raises(ValueError, match="guidance_scale is 3.5, but this model was trained for 0 … 3"):
        pipe(["three"], 3.5)
    card = model_card(tmp_path / "out", "me/one-pass")
    assert "in 0 … 3. The model takes w as an input" in card
    assert "for which it was trained ([Chen et al. 2025]" in card
    assert "chen2025visual" in card


def test_two_pass_model_can_be_trained_to_guide_in_one(tmp_path):
    few = [*ONE_PASS, "--max_train_steps", "1"]
    train(tmp_path / "one", *few, "--pretrained_model_name_or_path", str(TEACHER))
    train(tmp_path / "more", *few, "--pretrained_model_name_or_path", str(tmp_path / "one"))
    assert CFGPipeline.from_pretrained(tmp_path / "more").unet.max_guidance_scale == 4
    for flags in ([], ["--max_guidance_scale", "3"]):
        with pytest.raises(UserError, match="guides in one pass up to w = 4, .* --max_guidance_scale 4"):
            train(tmp_path / "out", *flags, "--pretrained_model_name_or_path", str(tmp_path / "one"))
    assert not (tmp_path / "out").exists()


def test_pretrained_network_starts_the_same_for_every_w():
    unet = CFGPipeline.from_pretrained(TEACHER).unet
    config = parse_config(CFGConfig, [*ONE_PASS, "--pretrained_model_name_or_path", str(TEACHER)])
    one_pass = ClassifierFreeGuidance.build(config, Digits()).pipeline.unet
    z, t, c = torch.randn(3, 1, 8, 8), torch.tensor(500.0), torch.tensor([1, 2, 10])
    pred = one_pass(z, t, c, guidance_scale=torch.tensor([0.0, 1.0, 4.0])).sample
    torch.testing.assert_close(pred, unet(z, t, c).sample, rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_the_two_pass_network_besides_the_input():
    plain = build_unet(parse_config(CFGConfig, TINY), None, channels=1, num_classes=10).state_dict()
    config = parse_config(CFGConfig, TINY)
    one_pass = build_unet(config, None, channels=1, num_classes=10, max_guidance_scale=4.0).state_dict()
    assert {name for name in one_pass if name not in plain} == {
        f"guidance_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(one_pass[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--conditioning_dropout_prob", "0"], "--max_guidance_scale needs a null class .* 0.1 to 0.2"),
        (["--max_guidance_scale", "0"], "max_guidance_scale must be a positive number, but is 0"),
        (["--max_guidance_scale", "inf"], "max_guidance_scale must be a positive number, but is inf"),
    ],
)
def test_wrong_settings_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_config(CFGConfig, [*ONE_PASS, *flags])


def test_variational_models_have_no_such_flag(capsys):
    with pytest.raises(SystemExit):
        parse_config(VDMConfig, ONE_PASS)
    assert "unrecognized arguments: --max_guidance_scale 4" in capsys.readouterr().err


def test_network_reads_w_only_in_its_range():
    unet: UNet2DCFGModel = make_method().pipeline.unet
    with pytest.raises(ValueError, match="in 0 … 4, the range that this network was trained for"):
        unet(torch.zeros(1, 1, 8, 8), torch.tensor(0.0), torch.tensor([0]), guidance_scale=torch.tensor([5.0]))
