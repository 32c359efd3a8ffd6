"""The order of the training rows, the same on any number of ranks and in a resumed run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from finetune.data.encoded import IGNORE


class EpochOrder(torch.utils.data.Sampler[int]):
    """The rows of an epoch in an order that depends on seed and epoch alone; padding rows come last.

    The epoch is read from the trainer, so it is right in a resumed run: on several ranks upstream's sampler does not
    get the epoch (accelerate 1.15 `DataLoaderShard.set_epoch`, through `SkipBatchSampler`).
    """

    def __init__(self, trainer: Any, dataset: Any) -> None:
        self.trainer, self.dataset = trainer, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        args, state = self.trainer.args, self.trainer.state
        count = len(self.dataset) - self.trainer.padding_rows
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(seed + int(state.epoch or 0))
        if args.train_sampling_strategy == "sequential":
            yield from range(count)
        elif args.train_sampling_strategy == "group_by_length":
            lengths = row_lengths(self.dataset)[:count].tolist()
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            yield from get_length_grouped_indices(lengths, size, generator=generator)
        else:
            yield from torch.randperm(count, generator=generator).tolist()
        yield from range(count, len(self.dataset))


def row_lengths(dataset: Any) -> npt.NDArray[np.int64]:
    """The number of tokens of each row; of a pair those of both sides."""
    names = [name for name in dataset.column_names if name.endswith("input_ids")]
    tables = dataset.select_columns(names).with_format("arrow").iter(batch_size=1000)
    return np.concatenate([np.sum([pc.list_value_length(t[n]).to_numpy() for n in names], axis=0) for t in tables])


def padded(dataset: Any, multiple: int) -> Any:
    """The dataset with rows without labels added until its length is a multiple of `multiple`."""
    import datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    row = dataset[0]
    row |= {name: [IGNORE] * len(ids) for name, ids in row.items() if name.endswith("labels")}
    padding = datasets.Dataset.from_list([row] * missing, features=dataset.features)
    return datasets.concatenate_datasets([dataset, padding])
