"""Augmentation and resizing; the only file that imports albumentations."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version at import otherwise

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from facecls.errors import UserError


class TrainTransform(A.Compose):  # type: ignore[misc]
    """Training augmentation: flip, small affine transforms, crop, colour, noise and dropout of patches.

    Args:
        size: Side of the result in pixels.
        affine: Share of faces that are rotated, scaled and shifted a little.
        smallest: Least scale of these; below 1 faces are seen from further away.
        crop: Smallest share of the area that a crop keeps, 0..1; 1 for no crop.
        colour: Strength of the changes of brightness, contrast, saturation and hue; 0 for none.
        noise: Share of faces that are blurred, noised or compressed.
        dropout: Share of faces that lose patches.
    """

    def __init__(
        self,
        size: int = 224,
        affine: float = 0.5,
        smallest: float = 0.9,
        crop: float = 0.75,
        colour: float = 0.3,
        noise: float = 0.15,
        dropout: float = 0.2,
    ) -> None:
        shake = A.Affine(
            scale=(smallest, 1.1),
            translate_percent=(-0.05, 0.05),
            rotate=(-12, 12),
            border_mode=cv2.BORDER_REFLECT_101,  # a black border would give the rotation away
            p=affine,
        )
        resize = (
            A.RandomResizedCrop((size, size), scale=(crop, 1.0), ratio=(0.9, 1.1), interpolation=cv2.INTER_AREA)
            if crop < 1
            else A.Resize(size, size, interpolation=cv2.INTER_AREA)
        )
        jitter = A.ColorJitter(
            brightness=(1 - colour, 1 + colour),
            contrast=(1 - colour, 1 + colour),
            saturation=(1 - colour, 1 + colour),
            hue=(-colour / 10, colour / 10),
            p=0.8 if colour else 0.0,
        )
        degrade = A.OneOf(
            [
                A.GaussianBlur(blur_limit=(3, 5)),
                A.GaussNoise(std_range=(0.02, 0.08)),
                A.ImageCompression(quality_range=(40, 90)),
            ],
            p=noise,
        )
        patches = A.CoarseDropout(
            num_holes_range=(1, 3), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=dropout
        )
        super().__init__([A.HorizontalFlip(p=0.5), shake, resize, jitter, A.ToGray(p=0.03), degrade, patches])


class EvalTransform:
    """Evaluation: the whole face, resized.

    Not a ``Compose``, whose checks take a tenth of the time of decoding and resizing.

    Args:
        size: Side of the result in pixels.
    """

    def __init__(self, size: int = 224) -> None:
        self.size = size

    def __repr__(self) -> str:
        """Everything that the result depends on."""
        return f"EvalTransform({self.size})"

    def set_random_seed(self, seed: int) -> None:
        """No-op: nothing is random."""

    def __call__(self, image: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.uint8]]:
        """Resizes a face.

        Args:
            image: RGB, uint8 (H, W, 3).

        Returns:
            ``image``, uint8 (size, size, 3).
        """
        return {"image": cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)}


Transform = A.Compose | EvalTransform
"""A pipeline: any ``Compose``, or one of the classes above."""


def check_image(image: np.ndarray, size: int) -> None:
    """Rejects what a transform must not give: it would be cut to bytes without a word.

    Args:
        image: What it gave.
        size: Side of the images in pixels.

    Raises:
        UserError: If it is not uint8 (S, S, 3).
    """
    if image.dtype != np.uint8 or image.shape != (size, size, 3):
        raise UserError(
            f"Expected data.train_transform and data.eval_transform to give uint8 images of (data.image_size, "
            f"data.image_size, 3), that is {(size, size, 3)}, but one gave {image.dtype} of {image.shape}; leave out "
            "Normalize and ToFloat, which the model does itself, and set the size to data.image_size."
        )
