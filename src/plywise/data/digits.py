"""The handwritten digits that ship with the package: 1,797 images of 8×8 pixels."""

from importlib.resources import files

import numpy as np
import torch

from plywise.data.batches import Split

__all__ = ["ATTRIBUTION", "Split", "load_digits"]

ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak, UCI Machine Learning "
    "Repository, 1998, doi:10.24432/C50P49, CC BY 4.0; as shipped by scikit-learn."
)


def load_digits(seed: int = 0) -> tuple[Split, Split, Split]:
    """Load training (1,100), validation (297) and test (400) images, shuffled by ``seed``; pixels in [0, 1].

    Example:
        >>> train, validation, test = load_digits()
        >>> train.x.shape, test.y.shape
        (torch.Size([1100, 64]), torch.Size([400]))
    """
    with (files("plywise.data") / "digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    x = torch.from_numpy(images.astype(np.float32) / 16)
    y = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = order.split([1100, 297, 400])
    train, validation, test = (Split(x[part], y[part]) for part in parts)
    return train, validation, test
