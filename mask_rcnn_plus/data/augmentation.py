"""What happens to a training image on its way to the model: detectron2's transforms, and others."""

from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

_GREY = 128.0  # what is beyond the image, near the mean of photographs


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The augmentations of training images, in their order.

    Without INPUT.JITTER, COLOR and BLUR they are detectron2's own. Colours change after all that
    makes images smaller, and padding comes last, so that it is the same in every image.

    Args:
        cfg: its INPUT counts.
    """
    given = cfg.INPUT
    own = detection_utils.build_augmentation(cfg, is_train=True)
    if given.CROP.ENABLED:
        own.insert(0, T.RandomCrop(given.CROP.TYPE, given.CROP.SIZE))
    if not given.JITTER.ENABLED:
        return [*own, *_colours(cfg)]
    height, width = given.JITTER.SIZE
    low, high = given.JITTER.SCALE
    jitter = ScaleJitter(scale=(low, high), size=(height, width))
    own = [jitter if isinstance(one, T.ResizeShortestEdge) else one for one in own]
    return [*own, *_colours(cfg), PadTo(size=(height, width))]


def moves_edges(cfg: CfgNode) -> bool:
    """Whether objects may lose parts, so that their boxes have to be drawn anew around the rest."""
    return bool(cfg.INPUT.CROP.ENABLED or cfg.INPUT.JITTER.ENABLED)


def _colours(cfg: CfgNode) -> list[T.Augmentation]:
    color, blur = cfg.INPUT.COLOR, cfg.INPUT.BLUR
    result: list[T.Augmentation] = []
    for kind, amount in (
        (T.RandomBrightness, color.BRIGHTNESS),
        (T.RandomContrast, color.CONTRAST),
        (T.RandomSaturation, color.SATURATION),
    ):
        if amount > 0:
            result.append(kind(1 - amount, 1 + amount))
    if color.LIGHTING > 0:
        result.append(T.RandomLighting(color.LIGHTING))
    if cfg.INPUT.FORMAT == "BGR":
        result = [InRGB(one) for one in result]
    if blur.PROB > 0:
        result.append(T.RandomApply(RandomBlur(sigma=tuple(blur.SIGMA)), blur.PROB))
    return result


class ScaleJitter(T.Augmentation):
    """Resizes by a random factor and takes a random window (Ghiasi et al., arXiv:2012.07177).

    detectron2's ResizeScale and FixedSizeCrop do so too, but end with an error where a long image
    shrinks to no rows, and draw one number for both directions, which shows the model no window off
    the diagonal.

    Args:
        scale: least and largest factor; with 1 the image just fits into the window.
        size: (height, width) of the window in pixels; an image may end up smaller.
    """

    def __init__(self, *, scale: tuple[float, float], size: tuple[int, int]) -> None:
        super().__init__()
        self.scale = scale
        self.size = size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resize and the crop.

        Args:
            image: (H, W, ...).
        """
        old = np.array(image.shape[:2])
        factor = np.random.uniform(*self.scale) * (np.array(self.size) / old).min()
        new = np.maximum(1, np.rint(old * factor)).astype(int)
        window = np.minimum(new, self.size)
        places = np.random.uniform(size=2)
        top, left = np.floor(places * (new - window + 1)).astype(int).tolist()
        (height, width), (rows, columns) = new.tolist(), window.tolist()
        return T.TransformList(
            [
                T.ResizeTransform(*old.tolist(), height, width),
                T.CropTransform(left, top, columns, rows, width, height),
            ]
        )


class PadTo(T.Augmentation):
    """Pads the right and the lower side of an image that is smaller than a size, with grey.

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The padding; masks get zeros.

        Args:
            image: (H, W, ...).
        """
        height, width = image.shape[:2]
        below, right = max(0, self.size[0] - height), max(0, self.size[1] - width)
        if not below and not right:
            return T.NoOpTransform()
        return T.PadTransform(0, 0, right, below, width, height, pad_value=_GREY)


class InRGB(T.Augmentation):
    """A colour change of detectron2, which takes RGB for granted, for images in BGR.

    Args:
        change: its transform is a BlendTransform.
    """

    def __init__(self, change: T.Augmentation) -> None:
        super().__init__()
        self.change = change

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The same change of the colours.

        Args:
            image: (H, W, 3), BGR.
        """
        blend = self.change.get_transform(image[..., ::-1])
        source = np.asarray(blend.src_image)
        if source.ndim and source.shape[-1] == 3:
            source = source[..., ::-1]
        return T.BlendTransform(source, blend.src_weight, blend.dst_weight)


class RandomBlur(T.Augmentation):
    """Blurs an image.

    Args:
        sigma: least and largest standard deviation of the Gaussian, in pixels.
    """

    def __init__(self, *, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The blur.

        Args:
            image: not looked at.
        """
        return BlurTransform(np.random.uniform(*self.sigma))


class BlurTransform(T.Transform):
    """A Gaussian blur of the pixels; masks and coordinates stay.

    Args:
        sigma: in pixels.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """The image, (H, W) or (H, W, C), uint8 or float, blurred."""
        source: Any = np.ascontiguousarray(img)
        # OpenCV drops the last axis of an image of one channel.
        return cv2.GaussianBlur(source, (0, 0), self.sigma).reshape(img.shape)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """The masks as they are."""
        return segmentation

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """The coordinates as they are."""
        return coords

    def inverse(self) -> T.Transform:
        """What was blurred stays so, as with detectron2's colour changes."""
        return T.NoOpTransform()
