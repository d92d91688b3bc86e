"""Stopping early, and the checkpoint with the lowest held-out loss as the final model. See `core.best`."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.best import History, best_step, held_out_losses, patience_is_over
from core.checkpoints import damage
from core.plan import StagePlan
from core.train_events import Reporter
from core.train_model import load_adapter_weights


class BestCallback(TrainerCallback):
    """Saves at every new lowest loss where the plan has a use for it, and stops when patience is over."""

    def __init__(self, stage: StagePlan, reporter: Reporter) -> None:
        self.stage, self.reporter = stage, reporter
        self.stopped_early = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        history = state.log_history
        wanted = self.stage.load_best_model_at_end or self.stage.early_stopping_patience is not None
        if wanted and best_step(history) == state.global_step:
            control.should_save = True
        if patience_is_over(history, self.stage) and state.global_step < state.max_steps:
            self.stopped_early = control.should_training_stop = control.should_save = True
            self.tell(history)

    def tell(self, history: History) -> None:
        """Say why it ends here."""
        losses = dict(held_out_losses(history))
        best = best_step(history)
        lowest = f"it was lowest at step {best} ({losses[best]:.4g})" if best is not None else "it was never finite"
        count = self.stage.early_stopping_patience
        self.reporter.notice(f"Stopped early: the held-out loss did not fall in {count} evaluations; {lowest}.")


def take_best(model: Any, history: History, checkpoints: Path, reporter: Reporter) -> None:
    """Put the weights of the best checkpoint into the model's adapter, and say which step that is."""
    losses, best = held_out_losses(history), best_step(history)
    folder = checkpoints / f"checkpoint-{best}"
    if best is None or damage(folder):
        reporter.notice(
            "There is no checkpoint of the lowest held-out loss; the final model is the last one.", "warning"
        )
        return
    load_adapter_weights(model, folder)
    last = f", the last one's is {losses[-1][1]:.4g}" if losses[-1][0] != best else ", the last step"
    reporter.notice(f"The final model is that of step {best}: held-out loss {dict(losses)[best]:.4g}{last}.")
