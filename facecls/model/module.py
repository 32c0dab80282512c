"""The LightningModule: one step shared by training, validation and test."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from facecls.data.tasks import TaskOptions, choose_tasks, create_tasks
from facecls.errors import UserError
from facecls.model.graph import GraphNet
from facecls.model.heads import AgeHeadKind, HeadOptions
from facecls.model.losses import check_weights, uncertainty_sum, weighted_sum
from facecls.model.metrics import HeadMetrics
from facecls.model.network import FaceModel
from facecls.model.schedule import Schedule, freeze, parameter_groups, plan_course
from facecls.model.trunk import VGGFACE2, create_trunk
from facecls.model.upgrade import upgrade
from facecls.model.views import Tta

Batch = dict[str, Tensor]
"""``image`` (N, 3, H, W) uint8 RGB, or ``features`` (N, V, D) float32 that the trunk made of V
views of it; ``index`` (N,) int64, row of the table; and (N,) int64 for each label column, such as ``gender``, ``race``
and ``age``, or ``MISSING``."""
Stage = Literal["train", "val", "test"]
_NAMED = 3
"""Faces of a batch that an error names."""


class FaceModule(pl.LightningModule):
    """Trains one model for several tasks.

    Args:
        trunk: timm name of the trunk; ``vggface2_resnet50`` is keras-vggface's, ``graph`` any other that was converted,
            whose trunk file says what it is.
        weights: Trunk file (safetensors) to start from; ``pretrained`` for timm's own weights; null for random ones.
        tasks: What is learned, such as [gender, age]; null for all that the faces are labelled with (see data.tasks).
        hidden: Sizes of each head's hidden layers; none for linear heads. The original notebook's are [512, 256, 32].
        dropout: Share of features dropped before the first and after each hidden layer of a head.
        feature_norm: Whether heads standardise each feature first, by its mean and standard deviation over the batch in
            training, and by their running averages otherwise. A trunk that stays frozen needs it, since its features
            may differ in size by orders of magnitude.
        age_head: ``distribution`` (a probability for each year, DLDL-v2) or ``regression`` (a sigmoid times the highest
            age, as in the original notebook).
        age_sigma: Standard deviation of the label distribution in years.
        label_smoothing: For classifications, 0..1.
        class_weights: Weight of a face in the loss by its class, such as {race: [1, 1, 1, 1, 2]}; 1 if not given.
        task_weights: Weight of each task's loss, 1 where not given; or ``learned`` (homoscedastic uncertainty).
        optimizer: Class path of any torch optimizer and its arguments.
        schedule: What trains when, and how fast.
        tta: What the test averages the logits of a face over: ``flip`` for its mirror image, ``zoom`` for both from
            further away as well, six passes; ``none`` for nothing.
        image_size: Side of the images in pixels; follows ``data.image_size``.
        task_options: What the tasks are; follows ``data.tasks``.
        graph: What a trunk ``graph`` is, in a checkpoint; otherwise follows ``weights``.
        face_frame: How the faces of the training lie in their images, in a checkpoint; otherwise measured by fit.

    Raises:
        UserError: If a value is out of range or the weights do not fit.
    """

    def __init__(
        self,
        trunk: str = VGGFACE2,
        weights: str | None = None,
        tasks: list[str] | None = None,
        hidden: list[int] = [],  # noqa: B006 - jsonargparse shows it as the default; it is never changed
        dropout: float = 0.2,
        feature_norm: bool = False,
        age_head: AgeHeadKind = "distribution",
        age_sigma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: dict[str, list[float]] = {},  # noqa: B006 - as above
        task_weights: Literal["learned"] | dict[str, float] = {},  # noqa: B006 - as above
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        tta: Tta = "none",
        image_size: int = 224,
        task_options: dict[str, TaskOptions | None] = {},  # noqa: B006 - as above
        graph: dict[str, Any] | None = None,
        face_frame: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        known = create_tasks(task_options)
        self.task_weights = {} if task_weights == "learned" else task_weights
        check_weights(known, class_weights, self.task_weights)
        self.save_hyperparameters(logger=False)
        options = HeadOptions(
            hidden=hidden,
            dropout=dropout,
            feature_norm=feature_norm,
            age_head=age_head,
            age_sigma=age_sigma,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        created = create_trunk(trunk, weights, image_size, graph)
        if isinstance(created.net, GraphNet):
            self.hparams["graph"] = created.net.description  # so that a checkpoint needs no trunk file
        self.model = FaceModel(created, choose_tasks(known, tasks), options)
        to: Any = self.model.to  # torch 2.11 does not annotate the argument
        to(memory_format=torch.channels_last)  # convolutions are faster in it, and batches come so
        self.log_variances = (
            nn.ParameterDict({task: torch.zeros(()) for task in self.model.tasks})
            if task_weights == "learned"
            else None
        )
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_metrics": nn.ModuleDict(
                    {name: HeadMetrics(head.create_metrics()) for name, head in self.model.heads.items()}
                )
                for stage in ("train", "val", "test")
            }
        )
        # a function is not copied with the module, as the average does; jsonargparse's factory holds the parser, and
        # through it the trainer, the data and all images
        self.optimizer: OptimizerCallable = lambda parameters: optimizer(parameters)
        self.schedule = schedule
        self.tta = tta
        self._frozen_norms: list[nn.Module] = []
        self._resumed_at, self._steps_made = (0, 0), 0

    def take_graph(self, net: GraphNet) -> None:
        """Takes another network for the trunk, in training mode, and its description for checkpoints.

        Args:
            net: With features as those of the network before.
        """
        self.model.trunk.net = net.to(memory_format=torch.channels_last)
        self.model.trunk.train()
        self.hparams["graph"] = net.description

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Estimates, as ``FaceModel.estimate`` gives them.

        Args:
            images: (N, 3, H, W) RGB, 0..255, uint8 or float.

        Returns:
            Probabilities, and ages in years.
        """
        return self.model.estimate(self.model(images))

    def _shared_step(self, batch: Batch, stage: Stage) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward pass, losses and metrics of a batch: losses by task, and the estimates."""
        logits = self._logits(batch, final=stage == "test")  # by task (N, L)
        losses = {name: head.loss(logits[name], batch) for name, head in self.model.heads.items()}
        self._check_finite(losses, batch, stage)
        estimates = self.model.estimate({name: values.detach() for name, values in logits.items()})
        for name, head in self.model.heads.items():
            metrics = self._head_metrics(stage)[name]
            metrics.update(estimates[name], head.targets(batch), losses[name].detach(), head.label_weight(batch))
        return losses, estimates

    def _check_finite(self, losses: Mapping[str, Tensor], batch: Batch, stage: Stage) -> None:
        """Stops at a loss that is NaN or infinite, before it reaches weights, metrics and checkpoints."""
        values = torch.stack([loss.detach() for loss in losses.values()])
        if torch.isfinite(values).all().item():
            return
        shown = ", ".join(f"{name} {value:g}" for name, value in zip(losses, values.tolist(), strict=True))
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        paths = data.faces["path"].iloc[batch["index"].cpu().numpy()].tolist()
        more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
        raise UserError(
            f"Expected finite losses, but in a {stage} batch they are {shown} (faces {', '.join(paths[:_NAMED])}{more})"
            "; lower the learning rate, set trainer.gradient_clip_val to 1, or use --trainer.precision 32-true."
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        losses, _ = self._shared_step(batch, "train")
        if self.trainer.world_size > 1:
            losses = self._rescale_for_ddp(losses, batch)
        if self.log_variances is None:
            total = weighted_sum(losses, self.task_weights)
        else:
            total = uncertainty_sum(losses, self.log_variances)  # type: ignore[arg-type] # maps names to parameters
            for task, value in self.log_variances.items():
                self.log(f"train/{task}/weight", torch.exp(-value.detach()), on_step=False, on_epoch=True)
        self.log("lr", self.lr_schedulers().get_last_lr()[-1])  # type: ignore[union-attr] # there is one
        self.log("loss", total.detach(), prog_bar=True, logger=False)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The estimates of a batch, with ``index``."""
        return {"index": batch["index"], **self._shared_step(batch, "val")[1]}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The estimates of a batch, with ``index``."""
        return {"index": batch["index"], **self._shared_step(batch, "test")[1]}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The logits of a batch as in the test, and the labels, (N, L) and (N,) by task, on the host."""
        return {task: (values.cpu(), batch[task].cpu()) for task, values in self._logits(batch, final=True).items()}

    def _logits(self, batch: Batch, final: bool) -> dict[str, Tensor]:
        """Logits by task, (N, L); ``final`` as in the test, averaged over views if that was asked for."""
        if "features" in batch:
            return self._logits_of_views(batch["features"], final)
        return self.model.averaged(batch["image"], self.tta if final else "none")

    def _logits_of_views(self, views: Tensor, final: bool) -> dict[str, Tensor]:
        """As ``_logits``, of features (N, V, D): training sees one of the views of each face, the test all of them."""
        count, number, _ = views.shape
        if final:
            logits = self.model.classify(views.flatten(0, 1))
            return {task: values.view(count, number, -1).mean(1) for task, values in logits.items()}
        seen = torch.randint(number, (count,), device=views.device) if self.training else 0
        return self.model.classify(views[torch.arange(count, device=views.device), seen])

    def _rescale_for_ddp(self, losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Rescales losses so that gradients averaged over devices are those of the mean over all their faces."""
        own = torch.stack([head.label_weight(batch) for head in self.model.heads.values()])  # (tasks,)
        everybody: Any = self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
        shares = self.trainer.world_size * own / everybody.clamp(min=torch.finfo(own.dtype).tiny)  # no label, no loss
        return {task: share * loss for share, (task, loss) in zip(shares, losses.items(), strict=True)}

    def _head_metrics(self, stage: Stage) -> Mapping[str, HeadMetrics]:
        return self.metrics[f"{stage}_metrics"]  # type: ignore[return-value] # a ModuleDict does not say so

    def _log_metrics(self, stage: Stage) -> None:
        values = {task: metrics.compute() for task, metrics in self._head_metrics(stage).items()}
        losses = {task: found["loss"] for task, found in values.items() if found}
        if losses:
            # fixed weights, so that all epochs can be compared when the weights are learned
            self.log(f"{stage}/loss", weighted_sum(losses, self.task_weights))
        for task, found in values.items():
            for name, value in found.items():
                self.log(f"{stage}/{task}/{name}", value)
            self._head_metrics(stage)[task].reset()

    def on_train_epoch_end(self) -> None:
        """Logs the metrics over the epoch's augmented faces."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("test")

    def on_train_start(self) -> None:
        """Freezes what the schedule says; a run resumed mid-epoch skips ``on_train_epoch_start``."""
        self._seed = torch.initial_seed()
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Freezes and unfreezes what the schedule says for this epoch."""
        self._frozen_norms = freeze(self.model.trunk.net, self.schedule, self.current_epoch)
        self.train()

    def train(self, mode: bool = True) -> "FaceModule":
        """As for any module, but BatchNorms whose statistics are frozen stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes dropout a function of seed, epoch and batch, so that a resumed run draws what it would have drawn."""
        sequence = np.random.SeedSequence((self._seed, self.current_epoch, batch_idx, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all parameters, and the learning rate by step."""
        rest = [self.model.heads, *([] if self.log_variances is None else [self.log_variances])]
        others = nn.ModuleList(cast("list[nn.Module]", rest))
        groups = parameter_groups(self.model.trunk.net, others, self.schedule.layer_decay)
        optimizer = self._create_optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        self.trainer.fit_loop.setup_data()  # as num_training_batches needs it
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise UserError("Expected an end of training, for the learning rate to fall to; set trainer.max_epochs.")
        accumulated = self.trainer.accumulate_grad_batches
        epoch, batch = self._resumed_at
        self.course = plan_course(
            math.ceil(self.trainer.num_training_batches / accumulated),
            -1 if self.trainer.max_epochs is None else self.trainer.max_epochs,
            self.trainer.max_steps,
            epoch,
            batch // accumulated,
            self._steps_made,
        )
        scheduler = LambdaLR(optimizer, partial(self.course.factor, self.schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _create_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Raises a ``UserError`` for what the optimizer does not take: a value, or groups with rates of their own."""
        try:
            optimizer = self.optimizer(groups)
            if isinstance(optimizer, SparseAdam):
                raise ValueError("SparseAdam takes sparse gradients only, which no layer here has")
            return optimizer
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"Expected a model.optimizer that takes its arguments and parameter groups, but: {error}; correct "
                "them, or take another such as torch.optim.AdamW."
            ) from error

    def resume_at(self, epoch: int, batch: int, steps: int) -> None:
        """Plans the learning rates of a resumed run.

        Args:
            epoch: The epoch to go on in.
            batch: Its first batch that is left.
            steps: Optimizer steps that were made before.
        """
        self._resumed_at, self._steps_made = (epoch, batch), steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Converts the checkpoint of a run that version 0.1 started."""
        upgrade(checkpoint)
