"""Converted models in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .conversion import save_converted
from .conversion.saving import load_weights

__all__ = ["ConvertedCallback"]


class ConvertedCallback(TrainerCallback):
    """Saves and resumes a model that `convert` has changed, in transformers' Trainer.

    transformers may save weights under other names than it loads them with. So this writes the
    files of `save_converted` into each checkpoint. Training that is resumed from a checkpoint in
    `output_dir` takes the weights from them, and so does the end of a training with
    `load_best_model_at_end`. The model is converted before, in the same way.
    """

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            save_converted(model, _checkpoint(args, state.global_step))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if state.global_step:
            load_weights(model, _checkpoint(args, state.global_step))

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_weights(model, Path(state.best_model_checkpoint))


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"
