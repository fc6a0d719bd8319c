"""The data of a run as loaders for Lightning, in an order that a resumed run continues."""

from __future__ import annotations

import signal
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from ...models.preprocessing import Preprocessing
from ..data.images import Images, collate, open_images
from ..data.order import InOrder, Shuffled
from ..data.parts import Part
from ..data.text import Windows, open_text
from .config import Config

__all__ = ["Data", "Part", "Parts"]

Parts = dict[Part, Images | Windows]


class Data(LightningDataModule):
    """The parts of a data set. Each is opened when it is first needed.

    Args:
        config: the configuration of the run.
        tokenizer: replaces the one of the configuration, for example by that of a checkpoint.
        parts: parts that are open already. Those that this object opens are added to it.
        preprocessing: replaces that of the configuration, for example by that of a checkpoint.
    """

    order: InOrder  # that of the part that is being evaluated

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None = None,
        parts: Parts | None = None,
        preprocessing: Preprocessing | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer, self.preprocessing = config, tokenizer, preprocessing
        self._open: Parts = {} if parts is None else parts

    def part(self, name: Part) -> Images | Windows:
        """Open a part, if it is not open yet.

        Raises:
            ValueError: wrong data.
            OSError: data that cannot be read.
        """
        if name not in self._open:
            data, seed = self.config.data, self.config.seed
            if data.kind == "images":
                self._open[name] = open_images(data, name, seed, self.preprocessing)
            else:
                self._open[name] = open_text(data, name, seed, tokenizer=self.tokenizer)
        return self._open[name]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The options of a model that follow from the data."""
        train = self.part("train")
        if isinstance(train, Windows):
            return {"vocab_size": train.vocab_size, "context": self.config.data.context}  # type: ignore[union-attr]
        return {
            "num_classes": len(train.classes),
            "image_size": train.options.image_size,
            "in_channels": train.channels,
        }

    @cached_property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        options = self.config.train
        if options.steps is not None:
            return options.steps
        assert options.epochs is not None
        return max(1, round(options.epochs * len(self.part("train")) / options.batch_size))

    def epoch_of(self, step: int) -> float:
        """How often the training part has been passed over after so many steps."""
        return step * self.config.train.batch_size / len(self.part("train"))

    @property
    def share(self) -> tuple[int, int]:
        """(rank, ranks): which part of each batch this process loads. Devices that divide the
        tables among them load the same samples."""
        if self.trainer is None:
            return 0, 1
        each = self.config.train.offset_ranks
        return self.trainer.global_rank // each, self.trainer.world_size // each

    def train_dataloader(self) -> DataLoader[Any]:
        options = self.config.train
        rank, ranks = self.share
        data, done = self.part("train"), self.trainer.global_step if self.trainer else 0
        order = Shuffled(
            len(data), options.batch_size // options.accumulate, self.steps * options.accumulate,
            self.config.seed, done * options.accumulate, rank, ranks,
        )  # fmt: skip
        return self._loader(data, order)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._in_order("valid")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order("test")

    def _in_order(self, name: Part) -> DataLoader[Any]:
        options = self.config.train
        rank, ranks = self.share
        each = max(1, options.batch_size // options.accumulate // ranks)
        data = self.part(name)
        self.order = InOrder(len(data), each, rank, ranks)
        return self._loader(data, self.order)

    def _loader(self, data: Images | Windows, order: Any) -> DataLoader[Any]:
        workers = self.config.train.workers
        return DataLoader(
            data,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate if isinstance(data, Images) else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_leave_interrupts,
        )


def _leave_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes. The main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
