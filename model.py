"""Backbones, pooling, heads and losses for telling writers apart on grey line images."""

from __future__ import annotations

import copy
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

from writer_search.config import COHOG, TrialConfig
from writer_search.descriptor import CoHOG

CONNECT_SECONDS = 8.0  # a machine without network is noticed within this time

# ------------------------------------------------------------------------------------ backbones


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 and what is added to them. After He et al. 2016, fig. 2.

    (batch, channels, height, width) to (batch, outputs, height / stride, width / stride). The same
    as torchvision's BasicBlock, names of parameters included; but to import torchvision takes two
    seconds, which a search would wait for at each of its starts.
    """

    def __init__(
        self, channels: int, outputs: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images if self.downsample is None else self.downsample(images)
        inner = F.relu(self.bn1(self.conv1(images)), inplace=True)
        outputs: Tensor = self.bn2(self.conv2(inner))
        outputs += shortcut
        return F.relu(outputs, inplace=True)


def _thin(pretrained: bool) -> tuple[nn.Module, int]:
    """Three stages of a ResNet-18 at half its width: for small data and CPUs.

    Hands differ in small shapes: without the fourth stage it learned faster and better, and costs
    a fifth of a ResNet-18. After He et al. 2016, but for the order at its start: with the maximum
    before batch norm and ReLU, these have a quarter of the values to work on, for a tenth of a
    step's time, and it learned as well.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
    ]
    for channels, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(
                nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        layers += [
            ResidualBlock(channels, outputs, stride, shortcut),
            ResidualBlock(outputs, outputs),
        ]
    for module in nn.Sequential(*layers).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers), 128


def _tiny(pretrained: bool) -> tuple[nn.Module, int]:
    """Two layers: for tests, and for trying a search out."""
    layers = [
        nn.Conv2d(3, 8, 5, stride=4, padding=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers), 32


def _resnet(name: str) -> Callable[[bool], tuple[nn.Module, int]]:
    """Build a torchvision network whose last two layers are pooling and classifier."""

    def build(pretrained: bool) -> tuple[nn.Module, int]:
        network = _torchvision(name, pretrained)
        return nn.Sequential(*list(network.children())[:-2]), network.fc.in_features

    return build


def _features(name: str) -> Callable[[bool], tuple[nn.Module, int]]:
    """Build a torchvision network whose layers before pooling stand in `features`."""

    def build(pretrained: bool) -> tuple[nn.Module, int]:
        network = _torchvision(name, pretrained)
        first = next(layer for layer in network.classifier if isinstance(layer, nn.Linear))
        return network.features, first.in_features

    return build


def _torchvision(name: str, pretrained: bool) -> Any:
    import torchvision

    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)


BUILDERS: dict[str, Callable[[bool], tuple[nn.Module, int]]] = {
    "tiny": _tiny,
    "resnet_thin": _thin,
    "resnet18": _resnet("resnet18"),
    "resnet34": _resnet("resnet34"),
    "resnet50": _resnet("resnet50"),
    "convnext_tiny": _features("convnext_tiny"),
    "efficientnet_v2_s": _features("efficientnet_v2_s"),
    "mobilenet_v3_large": _features("mobilenet_v3_large"),
    "mobilenet_v3_small": _features("mobilenet_v3_small"),
}


def _to_one_channel(backbone: nn.Module) -> None:
    """Let the first convolution read grey: the sum of its colour filters answers grey alike."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            grey = nn.Conv2d(
                1,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            with torch.no_grad():
                grey.weight.copy_(module.weight.sum(1, keepdim=True))
                if module.bias is not None and grey.bias is not None:
                    grey.bias.copy_(module.bias)
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, grey)
            return
    raise ValueError("the backbone has no convolution")


# ---------------------------------------------------------------------------- pooling and heads


class GeneralizedMeanPool(nn.Module):
    """The mean of p-th powers, to the power 1/p, with a learned p. GeM, after Radenović 2018."""

    def __init__(self, channels: int, power: float = 3.0) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, features: Tensor) -> Tensor:
        positive = features.float().clamp(min=1e-6)
        # As shares of each map's largest value no power of them is 0 or infinite in all places.
        largest = positive.detach().amax((2, 3), keepdim=True)
        shares: Tensor = (positive / largest).pow(self.power).mean((2, 3)).pow(1 / self.power)
        return largest.flatten(1) * shares


class AttentionPool(nn.Module):
    """A mean over positions, weighted by a learned score of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.score.weight)  # starts as the plain mean

    def forward(self, features: Tensor) -> Tensor:
        weights = self.score(features).flatten(2).softmax(-1)  # (batch, 1, positions)
        pooled: Tensor = (features.flatten(2) * weights).sum(-1)
        return pooled


class AveragePool(nn.Module):
    """The mean over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


POOLINGS: dict[str, Callable[[int], nn.Module]] = {
    "avg": AveragePool,
    "gem": GeneralizedMeanPool,
    "attention": AttentionPool,
}


class CosineClassifier(nn.Module):
    """Cosines between embeddings and one learned direction per writer."""

    def __init__(self, channels: int, num_writers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_writers, channels) * channels**-0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        cosines: Tensor = F.linear(F.normalize(embeddings.float()), F.normalize(self.weight))
        return cosines


class UncountedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that does not count its batches: nothing is computed from their number.

    On a GPU each count was a kernel of its own, 15 to 36 in a step.
    """

    def forward(self, images: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(
            images, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps
        )


class Standardised(nn.Module):
    """What describes a line, in deviations from the mean of training lines."""

    mean: Tensor  # (channels,), as is the other
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def forward(self, descriptions: Tensor) -> Tensor:
        standardised: Tensor = (descriptions - self.mean) / self.deviation
        return standardised


class WriterModel(nn.Module):
    """A backbone, a pooling, dropout and a classifier, as a trial's configuration has them.

    Images (batch, 1, height, width), float; returns logits (batch, writers), float32; with the
    cosface loss they are `scale` times a cosine. The backbone "cohog" is a descriptor of whole
    lines, of which nothing is trained. Beside a network (`beside`) a descriptor has a classifier of
    its own: of a whole line, the two are asked and their log-probabilities added, see
    `line_logits`; `forward` asks the network alone.
    """

    def __init__(self, config: TrialConfig, num_writers: int) -> None:
        super().__init__()
        self.sees_whole_lines = config.is_fitted
        self.beside: WriterModel | None = None
        self.backbone: nn.Module
        self.pool: nn.Module
        has_cosines = config.loss == "cosface" and not config.is_fitted
        if config.is_fitted:
            self.backbone = descriptor = CoHOG(
                config.cohog_directions,
                config.cohog_reach,
                config.cohog_smoothing,
                config.cohog_edge,
            )
            channels = descriptor.channels
            self.pool = Standardised(channels)
        else:
            self.backbone, channels = BUILDERS[config.backbone](config.pretrained)
            _to_one_channel(self.backbone)
            for module in self.backbone.modules():
                if type(module) is nn.BatchNorm2d and module.momentum is not None:
                    module.__class__ = UncountedBatchNorm2d
                    # MobileNet's 0.01 is for long trainings: here its statistics would still be
                    # those of the start when it validates.
                    module.momentum = max(module.momentum, 0.1)
            self.pool = POOLINGS[config.pooling](channels)
        self.dropout = nn.Dropout(0.0 if config.is_fitted else config.dropout)
        self.scale = config.scale if has_cosines else 1.0
        head = CosineClassifier if has_cosines else nn.Linear
        self.classifier: nn.Module = head(channels, num_writers)
        if config.with_cohog and not config.is_fitted:
            # Built last: the network's first weights are the same without it.
            beside = WriterModel(replace(config, backbone=COHOG), num_writers)
            self.beside = beside.requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        """Describe images by (batch, channels)."""
        embeddings: Tensor = self.pool(self.backbone(images))
        return embeddings

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.embed(images).float()
        with without_autocast(images.device):
            logits: Tensor = self.classifier(self.dropout(embeddings))
        return self.scale * logits

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Give the parameters that never come pretrained."""
        yield from self.pool.parameters()
        yield from self.classifier.parameters()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in float32 within a computation in bfloat16.

    For the last layer: in bfloat16 a cosine times 32 was off by 0.03 to 0.08, and the logits of the
    first two writers were equal for 1.7 % of images.
    """
    is_needed = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_needed else nullcontext()


def for_inference(model: WriterModel) -> WriterModel:
    """Give a copy in which convolutions do the work of the batch norms behind them.

    A validation pass takes a seventh less time on a CPU. The outputs differ by rounding only.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for (name, first), (next_name, second) in pairwise(list(module.named_children())):
            # So torchvision's blocks are made: what is applied in a row is registered in a row.
            if isinstance(first, nn.Conv2d) and isinstance(second, _BatchNorm):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, next_name, nn.Identity())
    return model


# ---------------------------------------------------------------------------------------- losses


def margin_logits(logits: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Take an additive margin off the true writer's cosine.

    logits (batch, writers) are `scale` times cosines;  labels (batch,), int64;  margin in cosine.
    After CosFace (Wang et al. 2018), eq. 4; margin 0 is a plain scaled softmax.
    """
    taken = F.one_hot(labels, logits.shape[1]).to(logits) * (margin * scale)
    return logits - taken


def classification_loss(logits: Tensor, config: TrialConfig, labels: Tensor) -> Tensor:
    """Give the mean loss of a batch, (), as the configuration has it."""
    if config.loss == "cosface":
        logits = margin_logits(logits, labels, config.margin, config.scale)
    return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)


def mix_images(images: Tensor, share: float) -> Tensor:
    """Mix each image with the one before it. After mixup (Zhang et al. 2018).

    images (batch, 1, height, width);  share of the image itself, in [0, 1]
    """
    return images * share + images.roll(1, 0) * (1 - share)


# ------------------------------------------------------------------------------ ImageNet weights


class WeightsUnavailableError(Exception):
    """ImageNet weights are neither on this machine nor to be had, and why."""


def ensure_imagenet_weights(backbone: str) -> None:
    """Make sure that the ImageNet weights of a backbone are on this machine, downloading once.

    Raises WeightsUnavailableError, within some ten seconds where there is no network.
    """
    import torchvision

    enum = torchvision.models.get_model_weights(backbone)
    url: str = enum.DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not file.exists():
            _probe(url)
        with _socket_timeout(CONNECT_SECONDS):
            BUILDERS[backbone](True)
    except Exception as error:  # network, disk, a damaged file: the caller says what follows
        raise WeightsUnavailableError(f"{backbone}: {file}: {error}") from None


def _probe(url: str) -> None:
    """Raise when the server cannot be reached in time; a name look-up obeys no socket timeout."""
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {CONNECT_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise outcome[0]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
