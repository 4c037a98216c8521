"""Every config key this project adds to detectron2's, each with what it does."""

from detectron2.config import CfgNode


def add_mask_rcnn_plus_config(cfg: CfgNode) -> None:
    """Adds this project's keys, with their defaults, to a detectron2 config in place.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    # "auto" takes the GPU when there is one, else the CPU; anything else is what torch.device takes ("cuda:1", "cpu").
    cfg.MODEL.DEVICE = "auto"

    # MODEL.ROI_HEADS.NUM_CLASSES stays detectron2's key; the value -1 means "as many as the training set has".

    # The generated data set of circles, squares and triangles (data/shapes.py): DATASETS.SHAPES.NAME + "_train" and
    # + "_val" are written below $DETECTRON2_DATASETS on first use, so that a first run needs no download.
    cfg.DATASETS.SHAPES = CfgNode()
    cfg.DATASETS.SHAPES.ENABLED = False
    cfg.DATASETS.SHAPES.NAME = "shapes"
    cfg.DATASETS.SHAPES.NUM_TRAIN = 400
    cfg.DATASETS.SHAPES.NUM_VAL = 100
    # Height and width of every image, in pixels.
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (192, 192)
    # How the masks are written: "polygon" or "rle".
    cfg.DATASETS.SHAPES.MASK_FORMAT = "polygon"
    # The same seed gives the same bytes.
    cfg.DATASETS.SHAPES.SEED = 0

    # How many test images are drawn, prediction beside ground truth, into OUTPUT_DIR/preview_<data set>.png after each
    # evaluation. 0 draws none.
    cfg.TEST.PREVIEW_IMAGES = 6


def get_cfg() -> CfgNode:
    """detectron2's default config plus this project's keys.

    Returns:
        a new, unfrozen config, ready for ``merge_from_file``.
    """
    from detectron2.config import get_cfg as detectron2_get_cfg

    cfg = detectron2_get_cfg()
    add_mask_rcnn_plus_config(cfg)
    return cfg
