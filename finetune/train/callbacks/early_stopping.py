"""Ends the training once evaluations stop to improve, also in a run that was killed and resumed."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """Upstream's callback, whose counter a resumed run continues.

    transformers 5.23 saves the counter in `trainer_state.json`. It restores it only with
    `restore_callback_states_from_checkpoint`, together with the old patience, and trains on from a checkpoint that was
    saved at the step of the stop, because `CallbackHandler.on_train_begin` resets the decision.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the counter; stops at once where the checkpoint was saved after the decision."""
        # A checkpoint of a run without early stopping has no entry, and saving the next one would fail.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = 0
        if state.global_step:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
