"""Says which image it was when one cannot be turned into a training sample."""

from collections.abc import Callable
from typing import Any

from mask_rcnn_plus.errors import UserError


class NamingMapper:
    """A mapper around detectron2's, whose errors name the image and come as one line.

    Args:
        mapper: takes a record in detectron2's format and returns a sample, or None to skip it.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """The sample.

        Args:
            record: of one image; ``file_name`` is its path.

        Raises:
            UserError: the image cannot be read or is not what the record says, or an annotation
                cannot be used.
        """
        try:
            return self._mapper(record)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"image '{record.get('file_name', '?')}' cannot be used: "
                f"{type(error).__name__}{': ' if reason else ''}{reason}"
            ) from error
