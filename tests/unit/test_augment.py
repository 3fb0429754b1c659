"""Augmentation: every output is a crop of the padded input, mirrored or not, the same for all time steps, and drawn from the generator alone."""

from __future__ import annotations

from math import ceil, floor, sqrt

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from toolchain.augment import Augmentation, apply
from toolchain.errors import UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crops(image: torch.Tensor, pad: int, *, flip: bool) -> list[torch.Tensor]:
    """Every crop of (C, H, W) out of the padded image, and its mirror image."""
    height, width = image.shape[1:]
    padded = functional.pad(image, (pad,) * 4)
    found = [padded[:, top : top + height, left : left + width] for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    return found + [crop.flip(2) for crop in found] if flip else found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.booleans(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_every_output_is_a_crop_of_the_padded_input(pad: int, flip: bool, channels: int, height: int, width: int, seed: int) -> None:
    images = torch.rand((5, channels, height, width), generator=seeded(1))
    kept = images.clone()
    found = apply(images, Augmentation(crop=pad, flip=flip), seeded(seed))
    assert torch.equal(images, kept)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert found.is_contiguous()
    for image, crop in zip(images, found, strict=True):
        assert any(torch.equal(crop, allowed) for allowed in crops(image, pad, flip=flip))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_events_share_one_crop_and_one_hole_over_all_time_steps(seed: int) -> None:
    still = torch.rand((6, 2, 7, 9), generator=seeded(1)) + 0.1
    events = still[..., None] * torch.arange(1, 5)
    chosen = Augmentation(crop=2, flip=True, cutout=0.5, cutout_fill=0.0)
    found = apply(events, chosen, seeded(seed))
    alone = apply(still, chosen, seeded(seed))
    assert torch.equal(found, alone[..., None] * torch.arange(1, 5))


def test_crops_and_mirror_images_are_drawn_evenly() -> None:
    image = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    found = apply(image.expand(5000, -1, -1, -1), Augmentation(crop=1, flip=True), seeded())
    _, counts = found.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    assert counts.min() > 200
    assert counts.max() < 360
    mirrored = apply(image.expand(4000, -1, -1, -1), Augmentation(flip=True), seeded())
    assert 1850 < int((mirrored[:, 0, 0, 0] == 3).sum()) < 2150
    assert torch.equal(mirrored[:, 0].sort(2).values, image[:, 0].expand(4000, -1, -1))


def test_the_generator_alone_decides() -> None:
    images = torch.rand((8, 3, 32, 32), generator=seeded(1))
    everything = Augmentation(crop=4, flip=True, cutout=0.5)
    torch.manual_seed(1)
    first = apply(images, everything, seeded(7))
    torch.manual_seed(2)
    assert torch.equal(first, apply(images, everything, seeded(7)))
    assert not torch.equal(first, apply(images, everything, seeded(8)))
    generator = seeded(7)
    apply(images, everything, generator)
    assert not torch.equal(first, apply(images, everything, generator))


def test_without_settings_nothing_happens_and_nothing_is_drawn() -> None:
    images, generator = torch.rand((2, 3, 8, 8)), seeded()
    state = generator.get_state()
    assert apply(images, Augmentation(), generator) is images
    assert torch.equal(generator.get_state(), state)


def test_cutout_erases_rectangles_of_the_stated_size_in_its_share_of_the_samples() -> None:
    images = torch.full((2000, 2, 32, 32), 2.0)
    found = apply(images, Augmentation(cutout=0.5), seeded())
    hole = (found != 2).all(1)
    assert torch.equal(hole, (found != 2).any(1))
    tall, wide = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), tall * wide)  # one full rectangle each
    cut = tall > 0
    assert 900 < int(cut.sum()) < 1100
    area, ratio = (tall * wide)[cut] / 1024, (tall / wide)[cut]
    assert area.max() <= 0.4
    assert area.min() > 0.005
    assert area.max() > 0.38
    assert 0.19 < area.mean() < 0.21
    assert ratio.max() < 4
    assert ratio.min() > 0.25
    values = found.masked_fill(found == 2, -1).amax((1, 2, 3))[cut]
    assert 0 <= values.min() < 0.05 < 0.95 < values.max() <= 1
    assert torch.equal(found.masked_fill(found == 2, 9).amin((1, 2, 3))[cut], values)  # one value in every channel
    assert hole.float().mean(0)[4:-4, 4:-4].min() > 0.02  # holes lie everywhere


def test_a_square_hole_of_fixed_size_lies_anywhere_inside() -> None:
    side = 8
    square = Augmentation(cutout=1.0, cutout_area=(64 / 1024, 64 / 1024), cutout_ratio=(1.0, 1.0), cutout_fill=0.0)
    found = apply(torch.ones((3000, 1, 32, 32)), square, seeded())
    hole = found[:, 0] == 0
    assert torch.equal(hole.sum((1, 2)), torch.full((3000,), side * side))
    starts = hole.any(2).int().argmax(1)
    assert (int(starts.min()), int(starts.max())) == (0, 32 - side)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0.01, 100), st.integers(0, 2**32))
def test_a_hole_of_any_size_fits_its_image(height: int, width: int, area: float, ratio: float, seed: int) -> None:
    asked = Augmentation(cutout=1.0, cutout_area=(area, area), cutout_ratio=(ratio, ratio), cutout_fill=0.5)
    found = apply(torch.zeros((4, 1, height, width)), asked, seeded(seed))
    hole = found[:, 0] == 0.5
    size = area * height * width
    tall, wide = int(hole[0].any(1).sum()), int(hole[0].any(0).sum())
    assert tall <= min(height, ceil(sqrt(size * ratio) + 1e-3))
    assert wide <= min(width, ceil(sqrt(size / ratio) + 1e-3))
    if min(floor(sqrt(size * ratio) - 1e-3), floor(sqrt(size / ratio) - 1e-3)) >= 1:
        assert hole.any(2).any(1).all()


def test_types_other_than_float32_stay() -> None:
    images = torch.rand((3, 1, 8, 8), dtype=torch.float64)
    assert apply(images, Augmentation(crop=1, flip=True, cutout=1.0), seeded()).dtype == torch.float64


def test_another_number_of_axes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch of shape \(3, 8, 8\) cannot be augmented"):
        apply(torch.zeros((3, 8, 8)), Augmentation(flip=True), seeded())


@pytest.mark.parametrize("settings", [{"crop": -1}, {"cutout": 1.5}, {"crop": 5000}, {"mirror": True}, {"cutout_ratio": [0, 1]}])
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, Augmentation)


@pytest.mark.cuda
def test_a_batch_on_the_gpu_is_augmented_as_on_the_cpu() -> None:
    images = torch.rand((8, 3, 32, 32))
    everything = Augmentation(crop=4, flip=True, cutout=0.5)
    assert torch.equal(apply(images.cuda(), everything, seeded()).cpu(), apply(images, everything, seeded()))
