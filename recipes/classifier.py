"""How the recipes train: cross entropy, AdamW with a linear warm-up and decay, accuracy on held-out data."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class Classifier(L.LightningModule):
    """Trains a network that maps inputs to class logits.

    Args:
        net: maps a batch to logits, ``[B, classes]``. It can be replaced by ``torch.compile(net)``; the whole
            LightningModule cannot be compiled, because ``self.log`` breaks Dynamo on torch 2.12 and 2.13.
        classes: number of classes.
        learning_rate: peak of the schedule.
        warmup: fraction of the training spent on rising to the peak.
        weight_decay: of AdamW.
    """

    def __init__(
        self, net: nn.Module, classes: int, learning_rate: float, warmup: float = 0.1, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.val_acc = MulticlassAccuracy(classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self(inputs)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        rise = max(self.warmup * steps, 1)

        def factor(step: int) -> float:
            return min((step + 1) / rise, max(steps - step, 0) / max(steps - rise, 1))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
