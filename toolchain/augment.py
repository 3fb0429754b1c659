"""Random crop, mirror and Cutout of a batch, drawn for each sample, the same for all time steps of an event sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

import msgspec

from toolchain import processes
from toolchain.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Augmentation", "apply"]

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1000)]


class Augmentation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What training images go through; nothing where every setting is left out.

    crop           pixels of zeros put around an image, out of which a crop of the old size is drawn (4 for CIFAR and CIFAR10-DVS)
    flip           mirror half of the samples left to right
    cutout         share of the samples that lose a rectangle (DeVries and Taylor 2017, arXiv 1708.04552); 0.5 is what OTTT trains with
    cutout_area    its area as a share of the image, drawn evenly between these two
    cutout_ratio   its height over its width, drawn evenly between these two
    cutout_fill    what it is filled with; null draws one value in [0, 1] for each sample

    The defaults of `cutout_*` are those of the transform that OTTT uses; a square hole of fixed area is area (a, a), ratio (1, 1), fill 0.
    """

    crop: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    flip: bool = False
    cutout: Share = 0.0
    cutout_area: tuple[Share, Share] = (0.02, 0.4)
    cutout_ratio: tuple[Ratio, Ratio] = (0.4, 2.5)
    cutout_fill: Union[float, None] = None


def apply(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """A batch of images (N, C, H, W) or events (N, C, H, W, T) in [0, 1], before any normalisation, augmented; `images` is left as it is.

    Everything random is drawn from `generator`, on its device: the same state gives the same batch. Where several processes train together, each draws
    for the whole batch and takes what concerns its own images. UsageError for another number of axes.
    """
    if images.ndim not in (4, 5):
        raise UsageError(f"a batch of shape {tuple(images.shape)} cannot be augmented: give (N, C, H, W), or (N, C, H, W, T) for events")
    if settings.crop or settings.flip:
        images = _moved(images, settings, generator)
    return _cut(images, settings, generator) if settings.cutout else images


def _moved(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and mirror at once: each sample's rows and columns, looked up in the padded batch."""
    import torch
    from torch.nn import functional

    samples, (height, width) = len(images), images.shape[2:4]
    whole, own = processes.size() * samples, processes.rows(processes.size() * samples)
    pad = settings.crop
    top, left = (torch.randint(2 * pad + 1, (whole, 1), generator=generator, device=generator.device)[own] for _ in range(2))
    rows = top + torch.arange(height, device=generator.device)
    columns = left + torch.arange(width, device=generator.device)
    if settings.flip:
        mirrored = torch.rand((whole, 1), generator=generator, device=generator.device)[own] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (*(0, 0) * (images.ndim - 4), pad, pad, pad, pad)).movedim(1, -1)  # channels beside the time steps
    which = torch.arange(samples, device=images.device)[:, None, None]
    taken = padded[which, rows.to(images.device)[:, :, None], columns.to(images.device)[:, None, :]]
    return taken.movedim(-1, 1).contiguous()


def _cut(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    import torch

    samples, (height, width) = len(images), images.shape[2:4]
    whole = processes.size() * samples
    drawn = torch.rand((6, whole), generator=generator, device=generator.device)
    chosen, area, ratio, down, right, fill = drawn[:, processes.rows(whole)]
    area = (settings.cutout_area[0] + (settings.cutout_area[1] - settings.cutout_area[0]) * area) * height * width
    ratio = settings.cutout_ratio[0] + (settings.cutout_ratio[1] - settings.cutout_ratio[0]) * ratio
    tall, wide = (area * ratio).sqrt().floor().clamp(max=height), (area / ratio).sqrt().floor().clamp(max=width)
    rows = _within(down, tall, height, chosen < settings.cutout)
    columns = _within(right, wide, width, chosen < settings.cutout)
    hole = (rows[:, :, None] & columns[:, None, :]).to(images.device)
    value = fill if settings.cutout_fill is None else torch.full_like(fill, settings.cutout_fill)
    shape = (samples, 1, *hole.shape[1:], *(1,) * (images.ndim - 4))
    return torch.where(hole.reshape(shape), value.to(images).reshape(-1, *(1,) * (images.ndim - 1)), images)


def _within(drawn: Tensor, length: Tensor, size: int, chosen: Tensor) -> Tensor:
    """(samples, size): where along one axis the hole of `length` lies, at an even draw among all places; nowhere for samples not chosen."""
    import torch

    start = (drawn * (size - length + 1)).floor().clamp(max=size - 1)
    place = torch.arange(size, device=drawn.device)
    inside: Tensor = (place >= start[:, None]) & (place < (start + length)[:, None]) & chosen[:, None]
    return inside
