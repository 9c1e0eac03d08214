"""The peer: JLML-ResNet39 in plain PyTorch, with our weights, so that both do the same work.

Needs `pip install -e '.[bench]'`. Modules are named as in `jlml_jax.models`, so that a weight's path there is its path
here.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from PIL import Image
from torch import nn

from jlml_jax.models import JLML

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.benchmark = True  # shapes do not change: the fastest of cuDNN's ways is searched for


class ResidualUnit(nn.Module):
    def __init__(self, channels: int, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, inner, 1, stride, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, 1, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = stride != 1 or channels != outer
        if self.shortcut:
            self.shortcut_conv = nn.Conv2d(channels, outer, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outer)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        if self.shortcut:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return F.relu(x + y, inplace=True)


class Tower(nn.Sequential):
    def __init__(self, channels: int, widths: tuple[int, ...], depth: int):
        super().__init__()
        for stage, width in enumerate(widths):
            for unit in range(depth):
                stride = 2 if stage > 0 and unit == 0 else 1
                self.add_module(f"conv{stage + 2}_{unit + 1}", ResidualUnit(channels, width, 2 * width, stride))
                channels = 2 * width

    def forward(self, x):
        return super().forward(x).mean((2, 3))


class Stem(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, features, 3, 2, 1, bias=False), nn.BatchNorm2d(features)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Head(nn.Module):
    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.fc = nn.Linear(channels, dim)

    def forward(self, x):
        return self.fc(x)


class TorchJLML(nn.Module):
    """The network of `model` (both branches, a classifier a branch, a shared stem; no BN or ReLU on the features)."""

    def __init__(self, model: JLML):
        super().__init__()
        self.num_strips = model.num_strips
        self.stem = Stem(model.stem_features)
        self.global_tower = Tower(model.stem_features, model.global_widths, model.depth)
        for strip in range(model.num_strips):
            self.add_module(f"local_tower_{strip}", Tower(model.stem_features, model.local_widths, model.depth))
        self.global_head = Head(2 * model.global_widths[-1], model.global_feature_dim)
        self.local_head = Head(2 * model.local_widths[-1] * model.num_strips, model.local_feature_dim)
        self.global_identity = nn.Linear(model.global_feature_dim, model.num_identities)
        self.local_identity = nn.Linear(model.local_feature_dim, model.num_identities)

    def forward(self, images):
        """Normalised images [B, 3, H, W] -> features and logits by branch."""
        x = self.stem(images)
        pooled = []
        for strip, part in enumerate(x.chunk(self.num_strips, dim=2)):
            # After the ReLU nothing is below the zero that the row below is padded with.
            part = F.max_pool2d(F.pad(part, (0, 0, 0, 1)), 2, (1, 2))
            pooled.append(getattr(self, f"local_tower_{strip}")(part))
        features = {"global": self.global_head(self.global_tower(F.max_pool2d(x, 3, 2, 1))),
                    "local": self.local_head(torch.cat(pooled, 1))}
        return features, {"global": self.global_identity(features["global"]),
                          "local": self.local_identity(features["local"])}

    def load(self, variables: Mapping[str, Any]) -> "TorchJLML":
        """Copies our `params` and `batch_stats`; every one of both sides must find its counterpart."""
        state = {}
        names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        for collection in variables.values():
            for path, leaf in flatten_dict(collection).items():
                array = np.asarray(leaf)
                if path[-1] == "kernel":
                    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
                state[".".join((*path[:-1], names[path[-1]]))] = torch.tensor(array)
        counters = {name for name, _ in self.named_buffers() if name.endswith("num_batches_tracked")}
        missing, unexpected = self.load_state_dict(state, strict=False)
        if set(missing) - counters or unexpected:
            raise ValueError(f"not the same network: {missing}, {unexpected}")
        return self


def normalise(images: torch.Tensor, data: ml_collections.ConfigDict) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], channels last in memory."""
    mean, std = (torch.tensor(values, device=images.device) for values in (data.mean, data.std))
    return ((images / 255.0 - mean) / std).permute(0, 3, 1, 2)


def penalties(network: TorchJLML) -> tuple[torch.Tensor, torch.Tensor]:
    """The l2,1 norm of the global feature layer and the exclusive l1,2 norm of the local one."""
    strips = network.local_head.fc.weight.unflatten(1, (network.num_strips, -1))  # [out, strips, in]
    return network.global_head.fc.weight.norm(dim=0).sum(), strips.abs().sum(2).square().sum()


def forwards(model: JLML, variables: Mapping[str, Any], images: np.ndarray, data: ml_collections.ConfigDict, dtype: str,
             at_once: int) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    """Calls that give the features of `images` uint8 [B, H, W, 3] by branch, as one would write them in PyTorch.

    Each computes them `at_once` times, and then waits for the device.

    Eager, and on a GPU compiled too; channels last; with `dtype` bfloat16 under autocast.
    """
    network = TorchJLML(model).load(variables).eval().to(DEVICE, memory_format=torch.channels_last)
    placed = torch.tensor(images, device=DEVICE)

    def forward(placed):
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, dtype == "bfloat16"):
            return network(normalise(placed, data))[0]

    def fetched(way):
        for _ in range(at_once):
            features = way(placed)
        _wait()
        return features

    return {f"torch {name}": functools.partial(fetched, way) for name, way in _ways(forward).items()}


def _ways(function: Callable) -> dict[str, Callable]:
    return {"eager": function} | ({"compiled": torch.compile(function)} if DEVICE == "cuda" else {})


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check_agreement(ours: Mapping[str, np.ndarray], theirs: Mapping[str, torch.Tensor], dtype: str, name: str) -> None:
    """An AssertionError if it is not the same work: features that differ by more than rounding explains."""
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for branch, values in ours.items():
        other = theirs[branch].float().cpu().numpy()
        difference = np.linalg.norm(values - other) / np.linalg.norm(other)
        assert difference < tolerance, f"{name}: {branch} features differ by {difference:.2g} of their norm"


class _Crops(torch.utils.data.Dataset):
    def __init__(self, encoded: Sequence[bytes], size: tuple[int, int], padding: int, data: ml_collections.ConfigDict):
        self.encoded, self.size, self.padding = encoded, size, padding
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, index):
        height, width = self.size
        image = Image.open(io.BytesIO(self.encoded[index])).convert("RGB").resize((width, height), Image.BILINEAR)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        padded = F.pad(image[None].float(), (self.padding,) * 4, mode="replicate")[0]
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        return (padded[:, top:top + height, left:left + width] / 255 - self.mean) / self.std


def loader(encoded: Sequence[bytes], height: int, width: int, batch_size: int, padding: int,
           data: ml_collections.ConfigDict, workers: int) -> torch.utils.data.DataLoader:
    """Shuffled, decoded, resized, flipped, cropped and normalised batches, by processes that stay."""
    return torch.utils.data.DataLoader(_Crops(encoded, (height, width), padding, data), batch_size, shuffle=True,
                                       drop_last=True, num_workers=workers, persistent_workers=True,
                                       multiprocessing_context="forkserver")


class Trainer:
    """One step as one would write it: a batch from images on the device, autocast, SGD with momentum."""

    def __init__(self, network: TorchJLML, images: np.ndarray, labels: np.ndarray, config: ml_collections.ConfigDict,
                 compiled: bool):
        self.network = network.to(DEVICE, memory_format=torch.channels_last).train()
        self.images, self.labels = torch.tensor(images, device=DEVICE), torch.tensor(labels, device=DEVICE).long()
        self.config = config
        self.optimizer = torch.optim.SGD(network.parameters(), config.optim.learning_rate, config.optim.momentum)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, self.config.train.dtype == "bfloat16"):
            _, logits = self.network(normalise(images, self.config.data))
        loss = sum(F.cross_entropy(values.float(), labels) for values in logits.values())
        l21, l12 = penalties(self.network)
        return loss + self.config.loss.lambda_global * l21 + self.config.loss.lambda_local * l12

    def steps(self, number: int) -> float:
        """So many steps, each of a batch drawn from the images; the loss of the first, before its update."""
        return torch.stack([self._step() for _ in range(number)]).tolist()[0]

    def _step(self) -> torch.Tensor:
        indices = torch.randperm(len(self.images), device=DEVICE)[:self.config.train.batch_size]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.images[indices], self.labels[indices])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def trainers(model: JLML, variables: Mapping[str, Any], images: np.ndarray, labels: np.ndarray,
             config: ml_collections.ConfigDict) -> dict[str, Trainer]:
    """Eager, and on a GPU compiled too."""
    return {f"torch {name}": Trainer(TorchJLML(model).load(variables), images, labels, config, name == "compiled")
            for name in _ways(lambda: None)}
