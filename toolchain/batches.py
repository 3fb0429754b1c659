"""A data set as training asks for it: batches of samples by number, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from toolchain.data import Dataset

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Batches:
    """Images and labels of `dataset` on `device`: an array goes there at once, images that stay in their files are fetched a batch at a time."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        import torch

        self.dataset, self.device = dataset, device
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.images = torch.from_numpy(dataset.images).to(device) if isinstance(dataset.images, np.ndarray) else None

    def seen(self, seed: int) -> Batches:
        """The same samples, cropped at random where they are cropped while they are decoded (see `Dataset.augmented`)."""
        changed = self.dataset.augmented(seed)
        return self if changed is self.dataset else Batches(changed, self.device)

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) of the samples with these numbers (int64, on the CPU), in this order."""
        import torch

        chosen = numbers.to(self.device)
        if self.images is not None:
            return self.images[chosen], self.labels[chosen]
        fetched = torch.from_numpy(self.dataset.images[numbers.numpy()])
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
            fetched = fetched.pin_memory()
        return fetched.to(self.device, non_blocking=True), self.labels[chosen]
