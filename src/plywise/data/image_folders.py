"""Reads images from folders, one for each class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plywise._util.extras import import_extra
from plywise._util.file_errors import describe_failure, require_file
from plywise.data.batches import Split
from plywise.data.sources import name_parts
from plywise.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_GREY = ("1", "L")
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def read_image_folder(path: Path, say: Callable[[str], None]) -> dict[str, Split]:
    """Read images of one size from a folder for each class, also within ``train``, ``val`` and ``test``.

    Classes are numbered in the order of the names of the folders. Pixels are float32 in [0, 1], of shape (N,
    channels, height, width), with one channel if all images are grey, else three.

    Args:
        path: the folder.
        say: takes sentences on what was guessed or left out.

    Raises:
        PlywiseError: Pillow is not installed, there are no images, one cannot be read or has more than 8
            bits, they differ in size, or a part has other classes than the training part.
    """
    parts = _find_parts(path, say)
    if "train" not in parts:
        raise DataError(f"{path} has {', '.join(parts)}, and no folder train.")
    classes = [folder.name for folder in _list_folders(parts["train"])]
    found = {name: _list_images(folder, classes) for name, folder in parts.items()}
    if empty := sorted(set(range(len(classes))) - {number for _, number in found["train"]}):
        say(f"{parts['train']} has no image of class {', '.join(classes[number] for number in empty)}.")
    modes = {_find_mode(file) for files in found.values() for file, _ in files}
    if modes & set(_ALPHA):
        say(f"Images in {path} have an alpha channel, which was left out.")
    mode = "L" if modes <= set(_GREY) else "RGB"
    return {name: _read_images(path, files, mode) for name, files in found.items()}


def _find_parts(path: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Find the folders of parts; without them the folder is the training part."""
    folders = _list_folders(path)
    parts, others = name_parts(str(path), {folder.name: folder for folder in folders})
    if parts and not others:
        return parts
    if parts:
        say(
            f"The folders in {path} were taken as classes, though one is called "
            f"{next(iter(parts.values())).name}: parts are taken where there are no others beside them."
        )
    return {"train": path}


def _list_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    names = [entry.name for entry in _list_folders(folder)]
    if unknown := [name for name in names if name not in classes]:
        raise DataError(f"{folder} has a class {unknown[0]!r} that training has not.")
    files = [
        (file, classes.index(name))
        for name in names
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in ENDINGS and not file.is_dir()
    ]
    if not files:
        raise DataError(f"{folder} holds no images in folders, one for each class ({', '.join(ENDINGS)}).")
    return files


def _read_image(file: Path, read: Callable[[Any], Any]) -> Any:
    """Open an image and return what ``read`` makes of it."""
    image_module = import_extra("PIL.Image", "Reading images needs Pillow: pip install pillow.")
    try:
        with image_module.open(require_file(file)) as image:
            return read(image)
    except Exception as error:  # a damaged image raises OSError, SyntaxError, ValueError and others
        reason = describe_failure(error, file)
        raise DataError(
            f"{file} is not an image that can be read: {reason}. Repair it, or take it away."
        ) from error


def _find_mode(file: Path) -> str:
    mode = str(_read_image(file, lambda image: image.mode))
    if mode.startswith("I") or mode == "F":
        raise DataError(
            f"{file} has pixels of more than 8 bits (Pillow's mode {mode}), and Pillow would clip them. "
            "Convert the images, or give a function that reads them."
        )
    return mode


def _read_images(path: Path, files: list[tuple[Path, int]], mode: str) -> Split:
    pixels = []
    for file, _ in files:
        pixels.append(_read_image(file, lambda image: np.asarray(image.convert(mode))))
        if pixels[-1].shape != pixels[0].shape:
            sizes = [" x ".join(map(str, each.shape[1::-1])) for each in (pixels[0], pixels[-1])]
            raise DataError(
                f"{path}: {files[0][0].name} is {sizes[0]} pixels and {file.name} {sizes[1]}. Resize them, "
                "or give a DataLoader whose transforms do."
            )
    x = torch.from_numpy(np.stack(pixels))
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()  # of bytes: the smaller copy
    return Split(x.float() / 255, torch.tensor([number for _, number in files]))
