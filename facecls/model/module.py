"""The LightningModule: one step shared by training, validation and test."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from facecls.data.tasks import CLASSES, TASKS, Task
from facecls.errors import UserError
from facecls.model.heads import AgeHead, FaceModel
from facecls.model.losses import (
    age_distribution_loss,
    age_regression_loss,
    class_loss,
    uncertainty_sum,
    weight_of_labels,
    weighted_sum,
)
from facecls.model.metrics import TaskMetrics
from facecls.model.schedule import Schedule, freeze, learning_rate_factor, parameter_groups
from facecls.model.trunk import VGGFACE2, create_trunk

Batch = dict[str, Tensor]
"""``image`` (N, 3, H, W) uint8 RGB, or ``features`` (N, D) float32 that the trunk made of it; ``gender``, ``race``,
``age``, ``index`` (N,) int64; a label may be ``MISSING``."""


class FaceModule(pl.LightningModule):
    """Training of one model for gender, race and age.

    Args:
        trunk: timm name of the trunk; ``vggface2_resnet50`` is the converted one.
        weights: Trunk file (safetensors) to start from; null for random weights.
        tasks: What is learned: any of gender, race, age.
        hidden: Sizes of each head's hidden layers; none for linear heads. The seed's are [512, 256, 32].
        dropout: Share of features dropped before the first and after each hidden layer of a head.
        age_head: ``distribution`` (117 bins, DLDL-v2) or ``regression`` (sigmoid x 116, as the seed).
        age_sigma: Standard deviation of the label distribution in years.
        label_smoothing: For gender and race, 0..1.
        class_weights: Weight of a face in the loss by its class, for gender (2 numbers) and race (5); 1 if not given.
        task_weights: Weight of each task's loss, 1 where not given; or ``learned`` (homoscedastic uncertainty).
        optimizer: Class path of any torch optimizer and its arguments.
        schedule: What trains when, and how fast.
        tta: ``flip`` averages the logits of a face and its mirror image in the test; ``none`` does not.
        image_size: Side of the images in pixels; follows ``data.image_size``.

    Raises:
        UserError: If a value is out of range or the weights do not fit.
    """

    def __init__(
        self,
        trunk: str = VGGFACE2,
        weights: str | None = None,
        tasks: list[Task] = list(TASKS),  # noqa: B006 - jsonargparse shows it as the default; it is never changed
        hidden: list[int] = [],  # noqa: B006 - as above
        dropout: float = 0.2,
        age_head: AgeHead = "distribution",
        age_sigma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: dict[Literal["gender", "race"], list[float]] = {},  # noqa: B006 - as above
        task_weights: Literal["learned"] | dict[Task, float] = {},  # noqa: B006 - as above
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        tta: Literal["none", "flip"] = "none",
        image_size: int = 224,
    ) -> None:
        super().__init__()
        _check(dropout, age_sigma, label_smoothing, class_weights)
        self.save_hyperparameters(logger=False)
        self.model = FaceModel(create_trunk(trunk, weights), tasks, hidden, dropout, age_head)
        to: Any = self.model.to  # torch 2.11 does not annotate the argument
        to(memory_format=torch.channels_last)  # convolutions are faster in it, and batches come so
        self.age_head = age_head
        self.age_sigma = age_sigma
        self.label_smoothing = label_smoothing
        for task, values in class_weights.items():
            self.register_buffer(f"{task}_weights", torch.tensor(values), persistent=False)
        self.task_weights = {} if task_weights == "learned" else task_weights
        self.log_variances = (
            nn.ParameterDict({task: torch.zeros(()) for task in self.tasks}) if task_weights == "learned" else None
        )
        # a function is not copied with the module, as the average does; jsonargparse's factory holds the parser, and
        # through it the trainer, the data and all images
        self.optimizer: OptimizerCallable = lambda parameters: optimizer(parameters)
        self.schedule = schedule
        self.tta = tta
        self.metrics = nn.ModuleDict(
            {f"{stage}_metrics": TaskMetrics(self.tasks) for stage in ("train", "val", "test")}
        )
        self._kept_norms: Sequence[nn.Module] = ()

    @property
    def tasks(self) -> list[Task]:
        """The tasks that are learned, in the order gender, race, age."""
        return list(self.model.heads)  # type: ignore[arg-type]

    def describe(self) -> str:
        """What is trained, in a line."""
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        source = self.hparams["weights"] or "random weights"
        return f"{self.model.trunk.name} from {source}, heads for {', '.join(self.tasks)}: {size:.1f} M parameters"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Estimates, as ``FaceModel.estimate`` gives them.

        Args:
            images: (N, 3, H, W) RGB, 0..255, uint8 or float.

        Returns:
            Probabilities, and ages in years.
        """
        return self.model.estimate(self.model(images))

    def train(self, mode: bool = True) -> "FaceModule":
        """As for any module, but BatchNorms whose statistics are frozen stay in evaluation mode."""
        super().train(mode)
        for norm in self._kept_norms:
            norm.eval()
        return self

    def losses(self, logits: Mapping[Task, Tensor], batch: Batch) -> dict[Task, Tensor]:
        """The loss of each task over the faces of a batch that have its label.

        Args:
            logits: As ``FaceModel.forward`` gives them.
            batch: With the labels.

        Returns:
            Scalars by task.
        """
        found: dict[Task, Tensor] = {}
        for task, values in logits.items():
            if task != "age":
                weights = getattr(self, f"{task}_weights", None)
                found[task] = class_loss(values, batch[task], self.label_smoothing, weights)
            elif self.age_head == "distribution":
                found[task] = age_distribution_loss(values, batch[task], self.age_sigma)
            else:
                found[task] = age_regression_loss(values, batch[task])
        return found

    def on_train_epoch_start(self) -> None:
        """Freezes and unfreezes what the schedule says for this epoch."""
        self._freeze()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes dropout a function of seed, epoch and batch, so that a resumed run draws what it would have drawn."""
        sequence = np.random.SeedSequence((self._seed, self.current_epoch, batch_idx, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def _freeze(self) -> None:
        self._kept_norms = freeze(self.model.trunk.net, self.schedule, self.current_epoch)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        logits = self._logits(batch)
        losses = self._count("train", logits, self.model.estimate({t: v.detach() for t, v in logits.items()}), batch)
        if self.trainer.world_size > 1:
            losses = self._shared(losses, batch)
        self.log("lr", self.lr_schedulers().get_last_lr()[-1])  # type: ignore[union-attr]
        if self.log_variances is None:
            total = weighted_sum(losses, self.task_weights)
        else:
            total = uncertainty_sum(losses, self.log_variances)  # type: ignore[arg-type]
            for task, value in self.log_variances.items():
                self.log(f"train/{task}/weight", torch.exp(-value.detach()), on_step=False, on_epoch=True)
        self.log("loss", total.detach(), prog_bar=True, logger=False)
        return total

    def _label_weights(self, batch: Batch) -> dict[Task, Tensor]:
        return {task: weight_of_labels(batch[task], getattr(self, f"{task}_weights", None)) for task in self.tasks}

    def _shared(self, losses: Mapping[Task, Tensor], batch: Batch) -> dict[Task, Tensor]:
        """Losses of which the mean over all devices, whose gradient is what they learn by, is that over their faces."""
        own = torch.stack(list(self._label_weights(batch).values()))  # (tasks,)
        everybody: Any = self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
        shares = self.trainer.world_size * own / everybody.clamp(min=torch.finfo(own.dtype).tiny)  # no label, no loss
        return {task: share * loss for share, (task, loss) in zip(shares, losses.items(), strict=True)}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Counts a batch and gives its estimates, with ``index``."""
        return self._judge("val", self._logits(batch), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Counts a batch and gives its estimates, with ``index``."""
        return self._judge("test", self._final_logits(batch), batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[Task, tuple[Tensor, Tensor]]:
        """The logits of a batch as in the test, and the labels, (N, C) and (N,) by task, on the host."""
        return {task: (v.cpu(), batch[task].cpu()) for task, v in self._final_logits(batch).items()}

    def _logits(self, batch: Batch) -> dict[Task, Tensor]:
        found: dict[Task, Tensor] = (
            self.model.classify(batch["features"]) if "features" in batch else self.model(batch["image"])
        )
        return found

    def _final_logits(self, batch: Batch) -> dict[Task, Tensor]:
        return self.model.mirror_averaged(batch["image"]) if self.tta == "flip" else self._logits(batch)

    def _judge(self, stage: str, logits: Mapping[Task, Tensor], batch: Batch) -> dict[str, Tensor]:
        estimates = self.model.estimate(logits)
        self._count(stage, logits, estimates, batch)
        return {"index": batch["index"], **estimates}

    def _count(
        self, stage: str, logits: Mapping[Task, Tensor], estimates: Mapping[str, Tensor], batch: Batch
    ) -> dict[Task, Tensor]:
        losses = self.losses(logits, batch)
        values = {task: loss.detach() for task, loss in losses.items()}
        self._stage_metrics(stage).update(estimates, batch, values, self._label_weights(batch))
        return losses

    def on_train_epoch_end(self) -> None:
        """Logs the metrics over the epoch's augmented faces."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("test")

    def _stage_metrics(self, stage: str) -> TaskMetrics:
        return self.metrics[f"{stage}_metrics"]  # type: ignore[return-value]

    def _log_metrics(self, stage: str) -> None:
        metrics = self._stage_metrics(stage)
        values = metrics.compute()
        losses = {task: values[f"{task}/loss"] for task in self.tasks if f"{task}/loss" in values}
        if losses:
            # fixed weights, so that all epochs can be compared when the weights are learned
            self.log(f"{stage}/loss", weighted_sum(losses, self.task_weights))
        for name, value in values.items():
            self.log(f"{stage}/{name}", value)
        metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all parameters, and the learning rate by step."""
        rest = nn.ModuleList([self.model.heads, *([] if self.log_variances is None else [self.log_variances])])
        groups = parameter_groups(self.model.trunk.net, rest, self.schedule.layer_decay)
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        self._configured = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("Expected an end of training, for the learning rate to fall to; set trainer.max_epochs.")
        a_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

        def factor(step: int) -> float:
            return learning_rate_factor(self.schedule, step, int(steps), step // a_epoch)

        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from the weights themselves, not their average, in a run that keeps no average.

        Args:
            checkpoint: As Lightning read it; ``state_dict`` may be replaced.
        """
        resuming = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if resuming and not any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])

    def on_train_start(self) -> None:
        """Lets the configured learning rate, weight decay and so on win over those of a checkpoint that is resumed."""
        self._seed = torch.initial_seed()
        self._freeze()  # a run that is resumed within an epoch does not come by its start
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [group["lr"] for group in self._configured]
        for group, configured in zip(scheduler.optimizer.param_groups, self._configured, strict=True):
            rate = configured["lr"] * scheduler.lr_lambdas[0](scheduler.last_epoch)
            group.update({**configured, "initial_lr": configured["lr"], "lr": rate})
            if group.get("fused"):  # it counts its steps where the weights are, and a checkpoint of another on the CPU
                for parameter in group["params"]:
                    if "step" in (state := scheduler.optimizer.state.get(parameter, {})):
                        state["step"] = state["step"].to(parameter.device)


def _check(dropout: float, sigma: float, smoothing: float, class_weights: Mapping[Any, Sequence[float]]) -> None:
    for name, value in (("dropout", dropout), ("label_smoothing", smoothing)):
        if not 0 <= value < 1:
            raise UserError(f"Expected model.{name} from 0 to below 1, but got {value}.")
    if sigma <= 0:
        raise UserError(f"Expected model.age_sigma above 0 years, but got {sigma}.")
    for task, weights in class_weights.items():
        if len(weights) != len(CLASSES[task]):
            raise UserError(
                f"Expected model.class_weights.{task} for {', '.join(CLASSES[task])}, but got {len(weights)} numbers."
            )


def load_module(path: str | Path) -> FaceModule:
    """Loads a trained model from a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: A checkpoint that ``facecls.fit`` wrote.

    Returns:
        The module; its trunk file is not needed.

    Raises:
        UserError: If there is no such file, or it is not such a checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(
            f"Expected a checkpoint at {path}, but there is none; runs keep theirs in checkpoints/best.ckpt."
        )
    try:
        module = FaceModule.load_from_checkpoint(path, map_location="cpu", weights=None, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load and Lightning raise many kinds for a file that is none of theirs
        raise UserError(f"Expected a checkpoint of facecls.fit, but could not load {path}: {error}") from error
    return module.eval()
