"""What finetui adds to TRL's trainers: saving and resuming one adapter, the two-stage rate, KTO's batches and KTO-S.

Built on the public hooks of TRL's `SFTTrainer` and `KTOTrainer`. `make_trainers` takes the classes when it is called,
because Unsloth replaces them in `trl` when it is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from core.batches import kto_batches
from core.plan import KTOPlan, StagePlan
from core.train_data import row_lengths
from core.train_logps import completion_logps
from core.train_model import load_adapter_weights


def kto_losses(
    logratios: torch.Tensor,
    labels: torch.Tensor,
    reference_point: torch.Tensor,
    beta: float,
    *,
    sign_correction: bool = False,
) -> torch.Tensor:
    """Unweighted KTO losses, one a row.

    `logratios` r = log π(y|x) − log π_ref(y|x), shape (rows,); `labels` bool, shape (rows,); `reference_point` z ≥ 0,
    a detached scalar. Desirable 1 − σ(β(r − z)), undesirable 1 − σ(β(z − r)): equation (7) of arXiv 2402.01306 as TRL
    has it. With `sign_correction` (KTO-S) z is replaced by −sign(r)·z: 1 − σ(β(r + sign(r)·z)) and
    1 − σ(β(−sign(r)·z − r)).
    """
    z = -logratios.detach().sign() * reference_point if sign_correction else reference_point
    gain = torch.where(labels, logratios - z, z - logratios)
    return 1 - functional.sigmoid(beta * gain)


class KTOBatches(torch.utils.data.Sampler[list[int]]):
    """The micro-batches of an epoch, for a DataLoader; `set_epoch` chooses the epoch.

    `dataset` has the columns label, prompt_key, prompt_ids and completion_ids; `batch_size` and `parts` are those of
    `kto_batches`.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, *, parts: int = 1, shuffle: bool) -> None:
        self.labels, self.prompts = dataset["label"][:], dataset["prompt_key"][:]
        self.lengths = row_lengths(dataset)
        self.batch_size, self.parts, self.seed, self.shuffle = batch_size, parts, seed, shuffle
        self.drop_last = False
        self.epoch = 0
        self.length = len(self._batches())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.shuffle else 0

    def _batches(self) -> list[list[int]]:
        return kto_batches(
            self.labels, self.prompts, self.batch_size, self.seed, self.epoch, lengths=self.lengths, parts=self.parts
        )

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())


@dataclass
class KTOCollator:
    """Adds to each row the completion of its neighbour in the batch, from which the KL term is estimated."""

    collate: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        neighbours = [examples[-1], *examples[:-1]]
        paired = [
            {**example, "KL_completion_ids": other["completion_ids"]}
            for example, other in zip(examples, neighbours, strict=True)
        ]
        return self.collate(paired)


class OneAdapter:
    """Mixin: checkpoints hold the adapter ``default`` alone, and resuming puts it back into the adapter ``default``.

    transformers' own resume loses it when a reference adapter stands beside it (see the test).
    """

    stage: StagePlan
    model: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir  # type: ignore[attr-defined]
        self.model.save_pretrained(folder, selected_adapters=["default"], safe_serialization=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers does, and then the plan's own rate: it may have been lowered since the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # type: ignore[attr-defined]
        rate = self.args.learning_rate  # type: ignore[attr-defined]
        if checkpoint is None or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return
        if scheduler.base_lrs != [rate] * len(scheduler.base_lrs):
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
            groups = self.optimizer.param_groups  # type: ignore[attr-defined]
            for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The plan's schedule; from `lr_reduction_step` on multiplied by `lr_reduction_factor`, inside its lambda."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        stage = self.stage
        if isinstance(stage, KTOPlan) and stage.two_stage_lr and not hasattr(scheduler, "finetui_two_stage"):
            scheduler.lr_lambdas = [
                lambda step, first=first: (
                    first(step) * (stage.lr_reduction_factor if step >= stage.lr_reduction_step else 1.0)
                )
                for first in scheduler.lr_lambdas
            ]
            scheduler.finetui_two_stage = True
        return scheduler


def sft_trainer_class() -> type:
    """TRL's SFTTrainer or Unsloth's replacement, with `OneAdapter` and the count of tokens that Unsloth drops."""
    from trl import SFTTrainer

    class Trainer(OneAdapter, SFTTrainer):
        tokens_seen = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs.setdefault("num_tokens", self.tokens_seen)
            super().log(logs, *args, **kwargs)

    return Trainer


def kto_trainer_class(*, sign_correction: bool = False) -> type:
    """TRL's KTOTrainer, or Unsloth's replacement of it, on rows that are tokenised and batched already.

    The loss is overridden for KTO-S alone: Unsloth leaves its memory-saving path when it sees an override.
    """
    from trl import KTOTrainer

    class Trainer(OneAdapter, KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["prompt_ids", "completion_ids", "label", "prompt_key"]

        def _loader(self, dataset: Any, batch_size: int, parts: int = 1, *, shuffle: bool) -> DataLoader:
            batches = KTOBatches(dataset, batch_size * parts, self.args.seed, parts=parts, shuffle=shuffle)
            loader = DataLoader(dataset, batch_sampler=batches, collate_fn=KTOCollator(self.data_collator))
            return self.accelerator.prepare(loader)

        def get_train_dataloader(self) -> DataLoader:
            size, parts = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
            return self._loader(self.train_dataset, size, parts, shuffle=True)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
            dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
            return self._loader(dataset, self.args.per_device_eval_batch_size, shuffle=False)

        def _sign_corrected_loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            mode = "train" if self.model.training else "eval"
            labels = batch["label"].bool()
            kl_logps = self._compute_kl_logps(model, batch)
            logps = completion_logps(model, batch)
            reference_logps, reference_kl = self.compute_ref_log_probs(self.model, batch)
            z = (kl_logps - reference_kl).mean().detach().clamp(min=0)
            ratios = logps - reference_logps
            sign_correction = isinstance(self.stage, KTOPlan) and self.stage.sign_correction
            losses = kto_losses(ratios, labels, z, self.beta, sign_correction=sign_correction)
            weights = torch.where(labels, self.desirable_weight, self.undesirable_weight)
            self._note_rewards(mode, self.beta * ratios.detach(), labels, z, batch)
            return (weights * losses).mean()

        def _note_rewards(self, mode: str, rewards: Any, labels: Any, z: Any, batch: Any) -> None:
            """The figures TRL logs, for the loss that is not TRL's own."""
            metrics = self._metrics[mode]
            metrics["kl"].append(z.item())
            for name, chosen in (("chosen", labels), ("rejected", ~labels)):
                if chosen.any():
                    metrics[f"rewards/{name}"].append(rewards[chosen].mean().item())
            if labels.any() and not labels.all():
                metrics["rewards/margins"].append((rewards[labels].mean() - rewards[~labels].mean()).item())
            if mode == "train":
                self._total_train_tokens += int(batch["attention_mask"].sum())
            metrics["num_tokens"] = [self._total_train_tokens]

    class SignCorrected(Trainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            if return_outputs:
                return super()._compute_loss(model, inputs, return_outputs)
            return self._sign_corrected_loss(model, inputs)

    return SignCorrected if sign_correction else Trainer
