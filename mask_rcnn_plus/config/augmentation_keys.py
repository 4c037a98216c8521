"""The config keys of the training images' augmentations, each with what it does."""

from detectron2.config import CfgNode


def add_augmentation_keys(cfg: CfgNode) -> None:
    """Adds the keys, with their defaults, which change nothing, in place.

    Every draw depends on SEED and the image's place in the order of the images alone.
    ``mask-rcnn-plus show-data`` draws what comes out.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    # Large-scale jitter, instead of MIN_SIZE_TRAIN, MAX_SIZE_TRAIN and INPUT.CROP: an image is
    # resized by a factor drawn evenly from SCALE, a window of SIZE is cut out at random where it is
    # larger, and grey is added on the right and below where it is smaller.
    cfg.INPUT.JITTER = CfgNode()
    cfg.INPUT.JITTER.ENABLED = False
    # 1 is the size at which the image just fits into SIZE.
    cfg.INPUT.JITTER.SCALE = (0.1, 2.0)
    # (height, width) of every training image, in pixels.
    cfg.INPUT.JITTER.SIZE = (1024, 1024)

    # Random colours: each factor is drawn evenly from 1 - x to 1 + x; 0 changes nothing.
    cfg.INPUT.COLOR = CfgNode()
    cfg.INPUT.COLOR.BRIGHTNESS = 0.0
    cfg.INPUT.COLOR.CONTRAST = 0.0
    cfg.INPUT.COLOR.SATURATION = 0.0
    # AlexNet's shift along the principal colours of ImageNet: its standard deviation, in grey
    # levels; 25.5 is the 0.1 of images from 0 to 1.
    cfg.INPUT.COLOR.LIGHTING = 0.0

    # Gaussian blur of an image with this probability, its sigma in pixels drawn evenly from SIGMA.
    cfg.INPUT.BLUR = CfgNode()
    cfg.INPUT.BLUR.PROB = 0.0
    cfg.INPUT.BLUR.SIGMA = (0.1, 2.0)

    # Copy-paste: with this probability, objects of a second training image, itself augmented, are
    # laid over an image. What they cover leaves the masks beneath. Masks become bitmaps, whatever
    # INPUT.MASK_FORMAT says.
    cfg.INPUT.COPY_PASTE = CfgNode()
    cfg.INPUT.COPY_PASTE.PROB = 0.0
    # How many objects are pasted is drawn evenly from 1 to this, or to all that there are.
    cfg.INPUT.COPY_PASTE.MAX_OBJECTS = 20
