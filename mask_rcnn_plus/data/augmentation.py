"""The augmentations of training images: detectron2's transforms, and a few more."""

import functools

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from mask_rcnn_plus.config import complete

_GREY = 128.0  # for padding; near the mean of photographs


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The augmentations of training images, in their order.

    Without INPUT.JITTER, COLOR and BLUR they are detectron2's own. Colours change after resizing,
    when there are fewer pixels. Padding comes last, so that it always has the same colour.
    """
    cfg = complete(cfg)
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    if cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if not cfg.INPUT.JITTER.ENABLED:
        return [*augmentations, *_colors(cfg)]
    height, width = jitter_size(cfg)
    low, high = cfg.INPUT.JITTER.SCALE
    jitter = ScaleJitter(scale=(low, high), size=(height, width))
    augmentations = [jitter if isinstance(a, T.ResizeShortestEdge) else a for a in augmentations]
    return [*augmentations, *_colors(cfg), PadTo(size=(height, width))]


def jitter_size(cfg: CfgNode) -> tuple[int, int]:
    """INPUT.JITTER.SIZE, (height, width) in pixels; a square that suits MIN_SIZE_TRAIN if it is ().

    COCO's recipes with jitter use 1024 pixels where those without it use 800.
    """
    if cfg.INPUT.JITTER.SIZE:
        return tuple(cfg.INPUT.JITTER.SIZE)
    shorter = cfg.INPUT.MIN_SIZE_TRAIN
    largest = shorter if isinstance(shorter, int) else max(shorter)
    side = max(1, round(min(1.28 * largest, cfg.INPUT.MAX_SIZE_TRAIN) / 32)) * 32
    return side, side


def moves_edges(cfg: CfgNode) -> bool:
    """Whether objects may lose parts, so that their boxes must be recomputed from the rest."""
    return bool(cfg.INPUT.CROP.ENABLED or complete(cfg).INPUT.JITTER.ENABLED)


def _colors(cfg: CfgNode) -> list[T.Augmentation]:
    color, blur = cfg.INPUT.COLOR, cfg.INPUT.BLUR
    factors = {
        T.RandomBrightness: color.BRIGHTNESS,
        T.RandomContrast: color.CONTRAST,
        T.RandomSaturation: color.SATURATION,
    }
    result = [kind(1 - amount, 1 + amount) for kind, amount in factors.items() if amount > 0]
    if color.LIGHTING > 0:
        result.append(T.RandomLighting(color.LIGHTING))
    if cfg.INPUT.FORMAT == "BGR":
        result = [InRGB(augmentation) for augmentation in result]
    if blur.PROB > 0:
        result.append(T.RandomApply(RandomBlur(sigma=tuple(blur.SIGMA)), blur.PROB))
    return result


class ScaleJitter(T.Augmentation):
    """Resizes by a random factor and crops a random window (Ghiasi et al., arXiv:2012.07177).

    detectron2's ResizeScale and FixedSizeCrop fail if a long image shrinks to zero rows. They also
    draw one number for both directions, so all their windows are on the diagonal.

    Args:
        scale: smallest and largest factor. At factor 1 the image just fits into the window.
        size: (height, width) of the window in pixels. The result may be smaller.
    """

    def __init__(self, *, scale: tuple[float, float], size: tuple[int, int]) -> None:
        super().__init__()
        self.scale = scale
        self.size = size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Returns a resize and a crop for an image (H, W, ...)."""
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
    """Pads an image with grey, on the right and below, to a size (height, width) in pixels."""

    def __init__(self, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Returns the padding of an image (H, W, ...); masks are padded with zeros."""
        height, width = image.shape[:2]
        below, right = max(0, self.size[0] - height), max(0, self.size[1] - width)
        if not below and not right:
            return T.NoOpTransform()
        return T.PadTransform(0, 0, right, below, width, height, pad_value=_GREY)


class InRGB(T.Augmentation):
    """Applies a colour augmentation with a BlendTransform, which expects RGB, to BGR images."""

    def __init__(self, change: T.Augmentation) -> None:
        super().__init__()
        self.change = change

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Returns the same colour change for an image (H, W, 3) in BGR."""
        blend = self.change.get_transform(image[..., ::-1])
        source = np.asarray(blend.src_image)
        if source.ndim and source.shape[-1] == 3:
            source = source[..., ::-1]
        return T.BlendTransform(source, blend.src_weight, blend.dst_weight)


class RandomBlur(T.Augmentation):
    """Blurs with a Gaussian; ``sigma`` is its smallest and largest deviation in pixels."""

    def __init__(self, *, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Returns a blur of random strength for images (H, W) or (H, W, C), uint8 or float."""
        return T.ColorTransform(functools.partial(_blur, sigma=np.random.uniform(*self.sigma)))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    # OpenCV drops the last axis of an image with one channel.
    return cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), sigma).reshape(image.shape)
