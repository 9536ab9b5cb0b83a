"""Test the losses of denoising diffusion GANs, on the real method object."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.nn.functional import softplus

from diffusers_cfg.config import parse_config
from diffusers_cfg.data.decoding import to_float
from diffusers_cfg.data.sources import Digits
from diffusers_cfg.engine.method import Batch, Terms
from diffusers_cfg.engine.state import frozen
from diffusers_cfg.method_settings import DDGANConfig
from diffusers_cfg.methods.ddgan import DenoisingDiffusionGAN, build_pipeline
from diffusers_cfg.randomness import Draws
from tests.support.models import randomize_head
from tests.support.runs import SMALLEST_GAN

BATCH_SIZE = 16
DIGITS = Digits()
NULL = 10


def make_method(*argv: str) -> DenoisingDiffusionGAN:
    """Return the method with two tiny networks that start neither at x = 0 nor at D = 0."""
    config = parse_config(DDGANConfig, [*SMALLEST_GAN, *argv])
    method = DenoisingDiffusionGAN(config, build_pipeline(config, DIGITS))
    torch.nn.init.normal_(method.pipeline.unet.conv_out.weight, std=0.1)
    randomize_head(method.discriminator)
    return method


def make_batch(step: int = 0, class_labels: torch.Tensor | None = None, size: int = BATCH_SIZE) -> Batch:
    """Return a global batch of digits."""
    x = to_float(torch.from_numpy(DIGITS.images[:size]).view(-1, 1, 8, 8))
    labels = torch.from_numpy(DIGITS.class_labels[:size]) if class_labels is None else class_labels
    return Batch(x, labels, Draws(0, step, range(size), size), step)


def loss_of(method: DenoisingDiffusionGAN, name: str, batch: Batch, **networks: torch.nn.Module) -> Terms:
    """Return the terms of an objective as the trainer computes them, with some networks replaced."""
    objective = next(objective for objective in method.objectives if objective.name == name)
    with frozen([module for other, module in method.modules.items() if other != name]):
        return objective.loss({**method.modules, **networks}, batch)


def losses_of(method: DenoisingDiffusionGAN, batch: Batch, **networks: torch.nn.Module) -> tuple[Terms, Terms]:
    """Return the terms of both objectives."""
    return loss_of(method, "discriminator", batch, **networks), loss_of(method, "generator", batch, **networks)


class Generator(torch.nn.Module):
    """A generator, given as a function of x_next, that records its inputs."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.function, self.calls = function, []

    def forward(
        self, x_next: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor, latent: torch.Tensor | None
    ) -> UNet2DOutput:
        self.calls.append({"x_next": x_next, "t": t, "c": class_labels, "latent": latent})
        return UNet2DOutput(sample=self.function(x_next))


class Judge(torch.nn.Module):
    """A discriminator that records its inputs, and returns a function of x_prev."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.sum((1, 2, 3))) -> None:
        super().__init__()
        self.function, self.calls = function, []

    def forward(
        self, x_prev: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor, c: torch.Tensor, float32: bool = False
    ) -> torch.Tensor:
        self.calls.append({"x_prev": x_prev, "x_next": x_next, "t": t, "c": c})
        return self.function(x_prev)


# ---- one training step, again


def cumulative(num_timesteps: int) -> torch.Tensor:
    """Return ᾱ before and after each step, `(T + 1,)`, from its closed form in continuous time."""
    u = 1e-3 + (1 - 1e-3) * torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.exp(-0.5 * u**2 * 19.9 - 0.1 * u)
    return alpha_bar / alpha_bar[0]


def step_again(method: DenoisingDiffusionGAN, batch: Batch, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of an objective and its R1 penalty without γ/2, from the equations, with the same draws."""
    config, generator, discriminator = method.config, method.modules["generator"], method.modules["discriminator"]
    draws, x, bars = batch.draws, batch.x, cumulative(config.num_timesteps).float()
    c = torch.where(draws.uniform("dropout") < config.conditioning_dropout_prob, NULL, batch.class_labels)
    t = torch.floor(draws.uniform(f"{name} time") * config.num_timesteps).long()
    before, after = (bars[i].view(-1, 1, 1, 1) for i in (t, t + 1))
    beta = 1 - after / before
    noise = [draws.normal(f"{name} {kind}", 1, 8, 8) for kind in ("noise of x_prev", "noise of x_next", "posterior")]
    x_prev = before.sqrt() * x + (1 - before).sqrt() * noise[0]
    x_next = (1 - beta).sqrt() * x_prev + beta.sqrt() * noise[1]
    with torch.enable_grad() if name == "generator" else torch.no_grad():
        x0 = generator(x_next, t, class_labels=c, latent=draws.normal(f"{name} latent", 4)).sample
        mean = before.sqrt() * beta / (1 - after) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - after) * x_next
        fake = mean + (beta * (1 - before) / (1 - after)).sqrt() * noise[2]
    relativistic = config.loss == "relativistic"
    if name == "generator":
        on_real, on_fake = discriminator(x_prev, x_next, t, c), discriminator(fake, x_next, t, c)
        return (softplus(on_real.detach() - on_fake) if relativistic else softplus(-on_fake)), None
    x_prev.requires_grad_()
    fake.requires_grad_()
    on_real, on_fake = discriminator(x_prev, x_next, t, c), discriminator(fake, x_next, t, c)
    loss = softplus(on_fake - on_real) if relativistic else softplus(-on_real) + softplus(on_fake)
    penalty = torch.autograd.grad(on_real.sum(), x_prev, create_graph=True)[0].square().sum((1, 2, 3))
    if relativistic:
        penalty = penalty + torch.autograd.grad(on_fake.sum(), fake, create_graph=True)[0].square().sum((1, 2, 3))
    return loss, penalty


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
@pytest.mark.parametrize("num_timesteps", [1, 4])
def test_a_training_step_follows_the_paper(num_timesteps, loss, step):
    """Compute both losses and all gradients again; R1 is due at step 3."""
    method = make_method("--num_timesteps", str(num_timesteps), "--loss", loss, "--r1_gamma", "0.4")
    batch = make_batch(step)
    for name in ("discriminator", "generator"):
        parameters = list(method.modules[name].parameters())
        terms = loss_of(method, name, batch)
        expected, penalty = step_again(method, batch, name)
        if penalty is not None and step == 3:
            logged = terms.logs["r1"] + terms.logs.get("r2", torch.tensor(0.0))
            torch.testing.assert_close(logged, penalty.detach(), rtol=1e-4, atol=1e-6)
            expected = expected + 0.4 / 2 * penalty
        torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-6)
        gradients = [torch.autograd.grad(values.mean(), parameters) for values in (terms.loss, expected)]
        assert sum(gradient.norm() for gradient in gradients[0]) > 0.1
        for own, other in zip(*gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


# ---- what the networks are given


def test_both_networks_are_given_the_same_dropped_labels():
    """A label dropped for one network only would tell real images from generated ones."""
    method = make_method("--conditioning_dropout_prob", "0.5")
    generator, judge = Generator(), Judge()
    losses_of(method, make_batch(), generator=generator, discriminator=judge)
    labels = [call["c"] for call in (*generator.calls, *judge.calls)]
    assert len(labels) == 5
    assert all(torch.equal(label, labels[0]) for label in labels)
    kept = labels[0] != NULL
    assert 0 < kept.sum() < BATCH_SIZE
    assert torch.equal(labels[0][kept], make_batch().class_labels[kept])


def test_unlabelled_images_are_of_the_null_class():
    """-1 and ∅ are the same row for both networks."""
    method = make_method("--conditioning_dropout_prob", "0")
    terms = [
        losses_of(method, make_batch(class_labels=torch.full((BATCH_SIZE,), label)))[i].loss
        for i in range(2)
        for label in (-1, NULL)
    ]
    assert torch.equal(terms[0], terms[1])
    assert torch.equal(terms[2], terms[3])


def test_pairs_share_x_next_and_are_fresh_for_each_network():
    method = make_method()
    generator, judge = Generator(), Judge()
    losses_of(method, make_batch(), generator=generator, discriminator=judge)
    real, fake, of_generator = judge.calls
    for name in ("x_next", "t", "c"):
        assert torch.equal(real[name], fake[name])
    first, second = generator.calls
    assert torch.equal(first["x_next"], real["x_next"])
    assert torch.equal(second["x_next"], of_generator["x_next"])
    assert not torch.equal(first["t"], second["t"])
    for name in ("x_next", "latent"):
        assert (first[name] - second[name]).abs().mean() > 0.1
    # The noises of a pair, of the posterior, and of both networks are independent.
    names = [f"{name} {noise}" for name in ("discriminator", "generator") for noise in
             ("noise of x_prev", "noise of x_next", "posterior")]  # fmt: skip
    noises = torch.stack([make_batch(size=256).draws.normal(name, 1, 8, 8).flatten() for name in names])
    assert (noises.corrcoef() - torch.eye(6)).abs().max() < 0.05
    at_0 = (real["t"] == 0).nonzero().flatten()
    assert torch.equal(real["x_prev"][at_0], make_batch().x[at_0])
    assert torch.equal(fake["x_prev"][at_0], torch.tanh(fake["x_next"][at_0]))


@pytest.mark.parametrize("num_timesteps", range(1, 9))
def test_all_steps_are_equally_likely(num_timesteps):
    method = make_method("--num_timesteps", str(num_timesteps))
    u = (torch.arange(num_timesteps * 7) + 0.5) / (num_timesteps * 7)
    assert method.step_at(u).bincount().tolist() == [7] * num_timesteps
    assert method.step_at(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, num_timesteps - 1]


def test_generator_without_a_latent_vector():
    method = make_method("--latent_dim", "0")
    generator = Generator()
    losses_of(method, make_batch(), generator=generator)
    assert [call["latent"] for call in generator.calls] == [None, None]
    assert method.pipeline.unet.latent_dim == 0
    assert torch.isfinite(losses_of(method, make_batch())[1].loss).all()


# ---- R1


def test_penalty_is_due_every_few_steps():
    method, logs = make_method("--r1_gamma", "2"), []
    for step in range(7):
        terms = loss_of(method, "discriminator", make_batch(step))
        logs.append("r1" in terms.logs)
        margin = terms.logs["real"], terms.logs["fake"]
        penalty = terms.logs["r1"] if logs[-1] else 0
        torch.testing.assert_close(terms.loss.detach(), softplus(-margin[0]) + softplus(margin[1]) + penalty)
    assert logs == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_penalty_is_of_x_prev_only(loss):
    """Each sample has its own gradient, and neither x_next nor the generator is differentiated."""
    method, generator = make_method("--loss", loss), Generator()
    judge = Judge(lambda x: (x * torch.arange(BATCH_SIZE).view(-1, 1, 1, 1)).sum((1, 2, 3)))
    logs = loss_of(method, "discriminator", make_batch(), generator=generator, discriminator=judge).logs
    slopes = [64.0 * i**2 for i in range(BATCH_SIZE)]
    assert logs["r1"].tolist() == slopes
    assert logs["r2"].tolist() == slopes if loss == "relativistic" else "r2" not in logs
    assert not any(call["x_next"].requires_grad for call in judge.calls)


# ---- precision


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
@pytest.mark.parametrize("step", [0, 1])
def test_penalty_and_posterior_stay_in_float32(loss, step):
    """Under autocast, R1 is that of float32, and so is the posterior sample of a generator in bf16."""
    method, batch = make_method("--loss", loss), make_batch(step)
    dtypes: list[torch.dtype] = []
    method.discriminator.conv_in.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    method.pipeline.unet.conv_in.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    exact = losses_of(method, batch)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = losses_of(method, batch)
    low, high = torch.bfloat16, torch.float32
    on_real = high if step == 0 else low
    on_fake = high if step == 0 and loss == "relativistic" else low
    assert dtypes == [low, on_real, on_fake, low, low, *([low] if loss == "relativistic" else [])]
    for own, other in zip(mixed, exact, strict=True):
        assert own.loss.dtype == torch.float32
        torch.testing.assert_close(own.loss, other.loss, rtol=0.05, atol=0.05)
    if step == 0:
        assert torch.equal(mixed[0].logs["r1"], exact[0].logs["r1"])

    judge = Judge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses_of(method, batch, generator=Generator(lambda x: x.bfloat16()), discriminator=judge)
    fakes = [call for call in judge.calls if not torch.equal(call["x_prev"], judge.calls[0]["x_prev"])]
    assert {call["x_prev"].dtype for call in fakes} == {torch.float32}
    x_next, noise = fakes[0]["x_next"], batch.draws.normal("discriminator posterior", 1, 8, 8)
    exact_fake = method.steps.denoise(x_next.bfloat16().float(), x_next, fakes[0]["t"], noise)
    assert torch.equal(fakes[0]["x_prev"], exact_fake)


# ---- logs, warnings and settings of the networks


def test_logs_by_step():
    terms = loss_of(make_method(), "discriminator", make_batch())
    margins = torch.stack([terms.logs[f"real_minus_fake/t_{t}"] for t in range(4)])
    assert (margins.isfinite().sum(0) == 1).all()
    torch.testing.assert_close(margins.nansum(0), terms.logs["real"] - terms.logs["fake"])
    t = (make_batch().draws.uniform("discriminator time") * 4).long()
    assert torch.equal(margins.isfinite().long().argmax(0), t)
    assert all(not value.requires_grad for value in terms.logs.values())
    dropped = make_batch().draws.uniform("dropout") < 0.1
    assert torch.equal(terms.logs["dropout_rate"], dropped.float())


DIED, WINS = "The discriminator has died", "The discriminator wins outright"


def logged(*margins: float, **others: float) -> dict[str, float]:
    by_step = {f"discriminator/real_minus_fake/t_{t}": margin for t, margin in enumerate(margins)}
    return by_step | {f"discriminator/{name}": value for name, value in others.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (logged(0.01, -0.01, r1=1e-4), DIED),
        (logged(0.0, 0.0, r1=0.0, real=3.0, fake=3.0), DIED),  # the logits of a relativistic loss have no zero
        (logged(0.0, 0.0), DIED),  # r1_gamma = 0
        (logged(0.01, -0.01, r1=0.1), None),  # an even game
        (logged(0.3, -0.01, r1=1e-4), None),
        (logged(-0.3, -0.3, r1=1e-4), None),
        (logged(30.0, 1.0, r1=5.0, loss=2.0, real=-90.0, fake=-105.0), WINS),
        (logged(9.0, 8.0, r1=0.0), None),
        ({"generator/loss": 1.0}, None),  # no finite value
    ],
)  # fmt: skip
def test_warnings_of_a_game_that_is_over(caplog, values, message):
    method = make_method()
    for step in range(10, 620, 10):
        method.watch(step, values)
    texts = [record.getMessage() for record in caplog.records]
    expected = [] if message is None else [message] * 3  # at 210, 410 and 610, and not at every log
    assert [text[: len(message or "")] for text in texts] == expected
    assert all(f"(since step {step})" in text for text, step in zip(texts, (10, 210, 410), strict=False))


def test_a_game_that_goes_on_is_not_warned_about(caplog):
    """A resumed run starts to count again, and so does a network that recovers; R1 is not in every log."""
    method, dead = make_method(), logged(0.0, 0.0)
    for step in range(5000, 5200, 10):
        method.watch(step, dead)
    method.watch(5200, logged(0.0, 0.0, r1=0.5))
    for step in range(5210, 5400, 10):
        method.watch(step, dead)
    assert not caplog.records
    method.watch(5400, dead)
    assert [record.getMessage()[:26] for record in caplog.records] == [DIED]


def test_each_network_has_its_own_optimizer_and_clipping():
    flags = ["--learning_rate", "1e-3", "--learning_rate_discriminator", "4e-3", "--max_grad_norm", "2"]
    method = make_method(*flags, "--max_grad_norm_discriminator", "7", "--adam_beta1", "0.3", "--adam_beta2", "0.8")
    found = {}
    for objective in method.objectives:
        optimizer = method.optimizer(objective)
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in method.modules[objective.name].parameters()]
        found[objective.name] = group["lr"], method.max_grad_norm(objective)
        assert (group["betas"], group["weight_decay"]) == ((0.3, 0.8), 0)
        assert objective.trains == (objective.name,)
    assert found == {"discriminator": (4e-3, 7.0), "generator": (1e-3, 2.0)}
    assert [objective.name for objective in method.objectives] == ["discriminator", "generator"]
    assert method.compiled == method.averaged == ("generator",)


def test_new_generator_starts_in_the_middle_of_the_range():
    config = parse_config(DDGANConfig, [*SMALLEST_GAN, "--latent_dim", "100", "--num_timesteps", "3"])
    pipeline = build_pipeline(config, DIGITS)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    assert (unet(torch.randn(2, 1, 8, 8), torch.tensor(1), latent=torch.randn(2, 100)).sample == 0).all()
    assert unet.config.resnet_time_scale_shift == "scale_shift"
    scheduler.set_timesteps(pipeline.num_inference_steps)
    assert scheduler.timesteps.tolist() == [2, 1, 0]
    assert unet.noise_process.items() <= scheduler.config.items()
    # The steps of the losses are those of the scheduler.
    steps = make_method("--num_timesteps", "3").steps.table
    assert steps.dtype == torch.float32
    before = torch.cat([torch.ones(1), scheduler.alphas_cumprod[:-1]])
    torch.testing.assert_close(steps[:, 0], before.sqrt())


def test_the_seed_decides_the_weights_of_both_networks():
    """The same seed gives the same two networks; another seed gives others."""
    first, again, other = (make_method("--seed", seed) for seed in ("3", "3", "4"))
    for name in ("generator", "discriminator"):
        weights = [next(iter(method.modules[name].parameters())) for method in (first, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_label_gain_is_that_of_the_generator():
    """A generator that returns the mean image of a class is closer to images of this class."""
    method = make_method()
    x, labels = make_batch(size=256).x, make_batch(size=256).class_labels
    means = torch.stack([x[labels == c].mean(0) for c in range(10)])

    class Means(torch.nn.Module):
        def forward(self, x_next, t, class_labels, latent):
            assert latent.shape == (len(x_next), 4)
            return UNet2DOutput(sample=means[class_labels])

    method.pipeline.unet.forward = Means().forward
    assert method.probe([make_batch(size=256)])["label_gain"] > 10
    method.pipeline.unet.forward = Generator().forward
    assert math.isnan(method.probe([make_batch(size=256)])["label_gain"])  # no difference at all
