"""Config keys, the values that they accept, and how a config is read."""

from mask_rcnn_plus.config.keys import (
    add_mask_rcnn_plus_config,
    complete,
    get_cfg,
    with_values,
)
from mask_rcnn_plus.config.reading import load_config, parse_config

__all__ = [
    "add_mask_rcnn_plus_config",
    "complete",
    "get_cfg",
    "load_config",
    "parse_config",
    "with_values",
]
