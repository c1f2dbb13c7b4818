"""TensorBoard, which is an extra."""

from typing import Any

from plywise.errors import PlywiseError


def require_tensorboard() -> Any:
    """TensorBoard's writer.

    Raises:
        PlywiseError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PlywiseError(
            "--tensorboard needs TensorBoard: pip install 'plywise[tensorboard]'.", see="error-extra"
        ) from error
    return SummaryWriter
