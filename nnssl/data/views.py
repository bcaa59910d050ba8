"""Weak and strong views of one patch: same geometry, different intensities, voxels in correspondence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.helpers.scalar_type import RandomScalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform


def spatial_transforms(
    patch_size: Sequence[int], rotation: RandomScalar, mirror_axes: Sequence[int], dummy_2d: bool
) -> BasicTransform:
    """nnU-Net's training geometry: rotation, scaling, crop to the patch, mirroring; dummy_2d: within slices
    only."""
    size = tuple(patch_size[1:] if dummy_2d else patch_size)
    warp = SpatialTransform(
        size,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=0.2,
        rotation=rotation,
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    steps: list[BasicTransform] = (
        [Convert3DTo2DTransform(), warp, Convert2DTo3DTransform()] if dummy_2d else [warp]
    )
    if mirror_axes:
        steps.append(MirrorTransform(allowed_axes=tuple(mirror_axes)))
    return ComposeTransforms(steps)


def strong_intensity_transforms(dummy_2d: bool) -> BasicTransform:
    """nnU-Net's intensity transforms, stronger: 1.7 to 3.3 times as often, over wider ranges."""
    contrast = BGContrast((0.5, 1.5))
    gamma = {"synchronize_channels": False, "p_per_channel": 1, "p_retain_stats": 1}
    steps: list[tuple[BasicTransform, float]] = [
        (GaussianNoiseTransform(noise_variance=(0, 0.15), p_per_channel=1, synchronize_channels=True), 0.3),
        # no timing-dependent choice between convolution and FFT: the same seed must give the same view
        (
            GaussianBlurTransform(
                blur_sigma=(0.5, 1.5), synchronize_channels=False, synchronize_axes=False, p_per_channel=0.7
            ),
            0.4,
        ),
        (
            MultiplicativeBrightnessTransform(
                multiplier_range=contrast, synchronize_channels=False, p_per_channel=1
            ),
            0.5,
        ),
        (
            ContrastTransform(
                contrast_range=contrast, preserve_range=True, synchronize_channels=False, p_per_channel=1
            ),
            0.5,
        ),
        (
            SimulateLowResolutionTransform(
                scale=(0.4, 1),
                synchronize_channels=False,
                synchronize_axes=True,
                ignore_axes=(0,) if dummy_2d else None,
                allowed_channels=None,
                p_per_channel=0.7,
            ),
            0.4,
        ),
        (GammaTransform(gamma=BGContrast((0.6, 1.7)), p_invert_image=1, **gamma), 0.2),
        (GammaTransform(gamma=BGContrast((0.6, 1.7)), p_invert_image=0, **gamma), 0.5),
    ]
    return ComposeTransforms([RandomTransform(t, apply_probability=p) for t, p in steps])


class RepeatableMorphology(ApplyRandomBinaryOperatorTransform):
    """nnU-Net's own shuffles its list of channels anew each time, so that what it draws depends on all draws
    before; this one starts from the same order."""

    def get_parameters(self, **data_dict: Any) -> dict:
        self.channel_idx.sort()
        return super().get_parameters(**data_dict)


class RepeatableRemoval(RemoveRandomConnectedComponentFromOneHotEncodingTransform):
    """As `RepeatableMorphology`."""

    def get_parameters(self, **data_dict: Any) -> dict:
        self.channel_idx.sort()
        return super().get_parameters(**data_dict)


def previous_stage_transforms(num_labels: int) -> BasicTransform:
    """nnU-Net's mistakes in the last `num_labels` channels, the one-hot segmentation of a cascade's previous
    stage: labels grown, shrunk, closed or opened, components left out."""
    channels = range(-num_labels, 0)
    morphology = RepeatableMorphology(list(channels), strel_size=(1, 8), p_per_label=0.5)
    removal = RepeatableRemoval(
        list(channels),
        fill_with_other_class_p=0,
        dont_do_if_covers_more_than_x_percent=0.15,
        p_per_label=0.5,
    )
    return ComposeTransforms(
        [RandomTransform(morphology, apply_probability=0.4), RandomTransform(removal, apply_probability=0.2)]
    )


class ViewTransform:
    """Image patch -> one weak view and K strong views. Picklable, so that workers may be spawned.

    In a cascade the segmentation of the previous stage follows the image's channels, one-hot: as it is in the
    weak view, with nnU-Net's simulated mistakes in the strong ones. Intensities are changed before.

    Args:
        patch_size: voxels per axis of the views.
        rotation: range in radians, as nnU-Net plans it.
        mirror_axes: axes that may be mirrored.
        dummy_2d: nnU-Net's anisotropic mode: geometry within slices only.
        num_strong: K.
        mask_channels: channels normalised inside the nonzero mask; they are zero outside it in every view.
        previous_labels: in a cascade the foreground's label values, one channel each; else empty.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        rotation: RandomScalar,
        mirror_axes: Sequence[int],
        dummy_2d: bool,
        num_strong: int,
        mask_channels: Sequence[int] = (),
        previous_labels: Sequence[int] = (),
    ) -> None:
        self.spatial = spatial_transforms(patch_size, rotation, mirror_axes, dummy_2d)
        self.intensity = strong_intensity_transforms(dummy_2d)
        self.mask = MaskImageTransform(
            apply_to_channels=list(mask_channels), channel_idx_in_seg=0, set_outside_to=0
        )
        self.num_strong = num_strong
        self.previous, self.mistakes = None, None
        if previous_labels:
            self.previous = MoveSegAsOneHotToDataTransform(1, list(previous_labels))
            self.mistakes = previous_stage_transforms(len(previous_labels))

    def __call__(
        self, image: torch.Tensor, segmentation: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Weak view and K strong views, each (C, S) float32, in a cascade (C + labels, S).

        image: (C, S'); segmentation: (1, S') int16, negative outside the body; in a cascade (2, S') with the
        previous stage's.
        """
        moved = self.spatial(image=image, segmentation=segmentation)
        weak, outside = moved["image"], moved["segmentation"]
        strong = [self.intensity(image=weak.clone())["image"] for _ in range(self.num_strong)]
        weak, strong = self._masked(weak, outside), [self._masked(s, outside) for s in strong]
        if self.previous is None or self.mistakes is None:
            return weak, strong
        weak, *strong = (self.previous(image=x, segmentation=outside)["image"] for x in (weak, *strong))
        return weak, [self.mistakes(image=s)["image"] for s in strong]

    def _masked(self, image: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        return self.mask(image=image, segmentation=outside)["image"]


def nonzero_channels(use_mask_for_norm: Sequence[bool] | None) -> list[int]:
    """Channels whose normalisation used the nonzero mask."""
    return [int(i) for i in np.flatnonzero(np.asarray(use_mask_for_norm or (), dtype=bool))]
