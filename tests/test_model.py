"""Backbones, pooling, losses, and ImageNet weights."""

from __future__ import annotations

import math
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import model as model_module
from model import (
    BUILDERS,
    POOLINGS,
    AttentionPool,
    AveragePool,
    GeneralizedMeanPool,
    WeightsUnavailableError,
    WriterModel,
    classification_loss,
    ensure_imagenet_weights,
    for_inference,
    margin_logits,
    mix_images,
)
from writer_search.config import TrialConfig

WRITERS = 5


def random_images(batch: int, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, 1, height, width), generator=generator)


def config_of(backbone: str = "tiny", **values: Any) -> TrialConfig:
    plain = {"seed": 0, "epochs": 1, "patience": 1, "dropout": 0.0, "label_smoothing": 0.0}
    return TrialConfig.from_dict({**plain, "backbone": backbone, **values})


def made(backbone: str = "tiny", **values: Any) -> WriterModel:
    return WriterModel(config_of(backbone, **values), WRITERS)


@pytest.fixture
def tiny() -> WriterModel:
    torch.manual_seed(0)
    return made().eval()


# -------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("backbone", BUILDERS)
@torch.no_grad()
def test_each_backbone_tells_writers_of_grey_images(backbone: str) -> None:
    torch.manual_seed(0)
    model = made(backbone).eval()
    convolutions = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions[0].in_channels == 1
    assert all(c.in_channels * c.groups != 3 for c in convolutions)
    images = random_images(2)
    logits = model(images)
    assert logits.shape == (2, WRITERS)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert torch.allclose(model(images.flip(0)), logits.flip(0), atol=1e-4)
    # With untrained statistics a deep network's output hardly depends on its input.
    for module in model.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    one, two = model(images)
    assert not torch.allclose(one, two, atol=1e-3), "it does not see its images"


@pytest.mark.parametrize("backbone", BUILDERS)
def test_statistics_of_a_short_training_are_its_own(backbone: str) -> None:
    """With MobileNet's momentum of 0.01 they would be those of the start for hundreds of steps."""
    model = made(backbone)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)


@pytest.mark.parametrize("backbone", BUILDERS)
@torch.no_grad()
def test_model_for_inference_answers_alike_with_fewer_norms(backbone: str) -> None:
    torch.manual_seed(0)
    model = made(backbone).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quicker = for_inference(model)
    images = random_images(2)
    torch.testing.assert_close(quicker(images), model.eval()(images), rtol=1e-3, atol=1e-4)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in quicker.modules())
    assert norms == (backbone == "resnet_thin"), "but for the one behind a maximum"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model itself is as it was"


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(tiny: WriterModel) -> None:
    images = random_images(6)
    logits = tiny(images)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(tiny(images[order]), logits[order], atol=1e-6)
    for number in range(6):
        assert torch.allclose(tiny(images[number : number + 1])[0], logits[number], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_width_and_height_give_the_same_embedding_size(pooling: str) -> None:
    model = made(pooling=pooling).eval()
    for height, width in ((16, 16), (24, 100), (64, 31)):
        images = random_images(2, height, width)
        assert model.embed(images).shape == (2, 32)
        assert model(images).shape == (2, WRITERS)


def number_of_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_thin_resnet_is_the_beginning_of_a_resnet18_at_half_its_width() -> None:
    thin, channels = BUILDERS["resnet_thin"](False)
    whole, _ = BUILDERS["resnet18"](False)
    convolutions = [
        [m for m in network.modules() if isinstance(m, nn.Conv2d)] for network in (thin, whole)
    ]
    assert len(convolutions[0]) == 15, "a stem, and three stages of four with two shortcuts"
    for ours, theirs in zip(*convolutions, strict=False):
        assert (ours.kernel_size, ours.stride) == (theirs.kernel_size, theirs.stride)
        assert 2 * ours.out_channels == theirs.out_channels
    assert channels == 128
    assert thin(torch.zeros(1, 3, 64, 256)).shape == (1, 128, 4, 16)


# ---------------------------------------------------------------------------- pooling and heads


FEATURES = torch.rand((3, 8, 4, 5), generator=torch.Generator().manual_seed(1)) - 0.2


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_pooling_does_not_depend_on_places(pooling: str) -> None:
    pool = POOLINGS[pooling](8)
    pooled = pool(FEATURES)
    assert pooled.shape == (3, 8)
    mixed = FEATURES.flatten(2)[..., torch.randperm(20)].reshape(FEATURES.shape)
    assert torch.allclose(pool(mixed), pooled, atol=1e-6)
    constant = torch.full((2, 8, 4, 5), 0.7)
    assert torch.allclose(pool(constant), torch.full((2, 8), 0.7), atol=1e-5)


@torch.no_grad()
def test_average_pool_is_the_mean() -> None:
    assert torch.allclose(AveragePool(8)(FEATURES), FEATURES.mean((2, 3)))


@torch.no_grad()
def test_generalized_mean_goes_from_the_mean_to_the_maximum() -> None:
    positive = FEATURES.clamp(min=0)
    assert torch.allclose(
        GeneralizedMeanPool(8, power=1.0)(FEATURES), positive.mean((2, 3)), atol=1e-5
    )
    assert torch.allclose(
        GeneralizedMeanPool(8, power=60.0)(FEATURES + 0.4), (FEATURES + 0.4).amax((2, 3)), rtol=0.06
    )
    between = GeneralizedMeanPool(8)(FEATURES)
    assert (between > positive.mean((2, 3))).all()
    assert (between < positive.amax((2, 3))).all()


def test_learned_power_of_a_mean_may_grow() -> None:
    """Also where a channel is dead: no gradient is lost, or no number."""
    features = FEATURES.clone().requires_grad_()
    pool = GeneralizedMeanPool(8, power=60.0)
    pool(features * 100 * torch.arange(8.0)[:, None, None]).sum().backward()
    for gradient in (features.grad, pool.power.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()


@torch.no_grad()
def test_attention_starts_as_the_mean_and_can_choose() -> None:
    pool = AttentionPool(8)
    assert torch.allclose(pool(FEATURES), FEATURES.mean((2, 3)), atol=1e-6)
    pool.score.weight[0, 0] = 1000.0
    place = FEATURES[:, 0].flatten(1).argmax(1)
    chosen = FEATURES.flatten(2)[torch.arange(3), :, place]
    assert torch.allclose(pool(FEATURES), chosen, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_differentiable_on_dead_features(pooling: str) -> None:
    features = torch.zeros((2, 8, 4, 5), requires_grad=True)
    POOLINGS[pooling](8)(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss", ["cross_entropy", "cosface"])
def test_the_head_is_all_that_is_not_backbone(pooling: str, loss: str) -> None:
    model = made(pooling=pooling, loss=loss)
    head = [id(parameter) for parameter in model.head_parameters()]
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    assert len(head) == len(set(head))
    assert set(head) == {id(parameter) for parameter in model.parameters()} - backbone
    assert not set(head) & backbone


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss", ["cross_entropy", "cosface"])
def test_every_weight_learns(pooling: str, loss: str) -> None:
    torch.manual_seed(0)
    model = made(pooling=pooling, loss=loss)
    labels = torch.arange(4)
    classification_loss(model(random_images(4)), config_of(loss=loss), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A shift of all scores changes no attention weight.
        assert parameter.grad.abs().max() > 0 or name == "pool.score.bias"


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    images = random_images(4)
    for dropout in (0.0, 0.5):
        model = made(dropout=dropout)
        assert torch.equal(model(images), model(images)) == (dropout == 0)
        assert torch.equal(model.eval()(images), model(images))


@torch.no_grad()
def test_cosface_logits_are_scaled_cosines() -> None:
    torch.manual_seed(0)
    model = made(loss="cosface", scale=20.0).eval()
    images = random_images(4)
    logits = model(images)
    assert logits.abs().max() <= 20.0
    directions = model.classifier.weight
    assert isinstance(directions, Tensor)
    for embedding, row in zip(model.embed(images), logits, strict=True):
        cosines = [F.cosine_similarity(embedding, d, dim=0) for d in directions]
        assert torch.allclose(row, 20.0 * torch.stack(cosines), atol=1e-4)
    directions *= 7.0
    assert torch.allclose(model(images), logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["cross_entropy", "cosface"])
def test_logits_are_not_rounded_to_bfloat16(loss: str) -> None:
    torch.manual_seed(0)
    model = WriterModel(config_of(loss=loss), 9).eval()
    images = torch.randn(8, 1, 16, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeddings, logits = model.embed(images), model(images)
    wanted = model.classifier(embeddings.float()) * model.scale
    assert torch.equal(logits, wanted.detach())
    assert not torch.equal(logits, logits.bfloat16().float())


def test_scale_acts_with_cosface_alone() -> None:
    torch.manual_seed(0)
    model = made(scale=20.0).eval()
    images = random_images(4)
    assert torch.allclose(model(images), model.classifier(model.embed(images)))


# ------------------------------------------------------------------------------------------ losses


LOGITS = torch.randn((6, WRITERS), generator=torch.Generator().manual_seed(2)) * 3
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def test_a_margin_of_zero_is_plain() -> None:
    assert torch.equal(margin_logits(LOGITS, LABELS, 0.0, 30.0), LOGITS)
    without = config_of(loss="cosface", margin=0.0, scale=30.0)
    assert classification_loss(LOGITS, without, LABELS) == F.cross_entropy(LOGITS, LABELS)


def test_a_margin_is_taken_off_the_true_writer_alone() -> None:
    taken = LOGITS - margin_logits(LOGITS, LABELS, 0.25, 16.0)
    assert torch.allclose(taken, 4.0 * F.one_hot(LABELS, WRITERS), atol=1e-5)


def test_cosface_as_computed_by_hand() -> None:
    """Cosines 0.6 (true) and 0.2, margin 0.1, scale 10: logits 5 and 2."""
    logits = 10 * torch.tensor([[0.6, 0.2]])
    cosface = config_of(loss="cosface", margin=0.1, scale=10.0)
    loss = classification_loss(logits, cosface, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_is_cross_entropy_with_smoothing(smoothing: float) -> None:
    loss = classification_loss(LOGITS, config_of(label_smoothing=smoothing), LABELS)
    assert torch.equal(loss, F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))
    log_softmax = LOGITS.log_softmax(1)
    right = -log_softmax[torch.arange(6), LABELS]
    by_hand = (1 - smoothing) * right - smoothing * log_softmax.mean(1)
    assert loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_mixing_goes_from_the_image_to_the_one_before_it() -> None:
    images = random_images(4)
    assert torch.equal(mix_images(images, 1.0), images)
    assert torch.equal(mix_images(images, 0.0), images[[3, 0, 1, 2]])
    mixed = mix_images(images, 0.25)
    assert torch.allclose(mixed[1], 0.25 * images[1] + 0.75 * images[0])


def test_mixing_keeps_the_mean_of_a_batch() -> None:
    images = random_images(4)
    assert torch.allclose(mix_images(images, 0.3).mean(0), images.mean(0), atol=1e-6)


# --------------------------------------------------------------------------------- ImageNet weights


def refuse_connections(*_: Any, **__: Any) -> None:
    raise OSError("no network")


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of downloaded weights, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse_connections)
    monkeypatch.setattr(torch.hub, "urlopen", refuse_connections)
    directory = Path(torch.hub.get_dir()) / "checkpoints"
    assert tmp_path in directory.parents
    directory.mkdir(parents=True)
    return directory


def weights_file(checkpoints: Path, backbone: str) -> Path:
    url = torchvision.models.get_model_weights(backbone).DEFAULT.url
    return checkpoints / Path(url).name


@torch.no_grad()
def test_weights_at_hand_are_used_and_answer_grey_alike(checkpoints: Path) -> None:
    torch.manual_seed(3)
    saved = torchvision.models.resnet18(weights=None).eval()
    torch.save(saved.state_dict(), weights_file(checkpoints, "resnet18"))
    ensure_imagenet_weights("resnet18")

    torch.manual_seed(4)
    model = made("resnet18", pretrained=True).eval()
    embedded: list[Tensor] = []
    saved.avgpool.register_forward_hook(lambda *call: embedded.append(call[-1].flatten(1)))
    grey = random_images(2)
    saved(grey.expand(-1, 3, -1, -1))
    assert embedded[0].std() > 0
    assert torch.allclose(model.embed(grey), embedded[0], rtol=1e-3, atol=1e-4)


def test_missing_weights_without_network_are_told_at_once(checkpoints: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WeightsUnavailableError, match=r"resnet18.*no network") as caught:
        ensure_imagenet_weights("resnet18")
    assert str(weights_file(checkpoints, "resnet18")) in str(caught.value)
    assert time.monotonic() - started < 5
    assert list(checkpoints.iterdir()) == []


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> Iterator[None]:
    """A network in which every connection hangs."""
    end = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        end.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    monkeypatch.setattr(model_module, "CONNECT_SECONDS", 0.2)
    yield
    end.set()


@pytest.mark.usefixtures("silent_server")
def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(WeightsUnavailableError, match="no answer"):
        ensure_imagenet_weights("mobilenet_v3_small")
    assert time.monotonic() - started < 5


def test_a_download_that_breaks_is_told(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def close(self) -> None: ...

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(WeightsUnavailableError, match="no network"):
        ensure_imagenet_weights("mobilenet_v3_small")
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_file_of_weights_is_named(checkpoints: Path, content: bytes) -> None:
    file = weights_file(checkpoints, "mobilenet_v3_small")
    file.write_bytes(content)
    with pytest.raises(WeightsUnavailableError, match=file.name):
        ensure_imagenet_weights("mobilenet_v3_small")


def test_the_time_limit_of_sockets_is_put_back(checkpoints: Path) -> None:
    before = socket.getdefaulttimeout()
    file = weights_file(checkpoints, "mobilenet_v3_small")
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), file)
    ensure_imagenet_weights("mobilenet_v3_small")
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsUnavailableError):
        ensure_imagenet_weights("mobilenet_v3_small")
    assert socket.getdefaulttimeout() == before
