"""Reads images from folders, one for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from plywise.data.batches import Split
from plywise.data.sources import NAMES
from plywise.errors import PlywiseError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read_image_folder(path: Path) -> dict[str, Split]:
    """Images of one size in folders, one for each class, or such folders in ``train``, ``val`` and ``test``.

    Classes are numbered in the order of the folders' names. Pixels are float32 in [0, 1], (N, channels,
    height, width); one channel if all images are grey, else three.

    Raises:
        PlywiseError: Pillow is not installed, there are no images, they differ in size, or a part has other
            classes than the training part.
    """
    folders = _list_folders(path)
    parts = {NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in NAMES}
    if len(parts) < len(folders) or not parts:
        parts = {"train": path}
    if "train" not in parts:
        raise PlywiseError(f"{path} has {', '.join(parts)}, and no folder train.", see="error-data")
    classes = [folder.name for folder in _list_folders(parts["train"])]
    found = {name: _list_images(folder, classes) for name, folder in parts.items()}
    is_grey = all(_find_mode(file) in ("1", "L") for files in found.values() for file, _ in files)
    return {name: _read_images(path, files, "L" if is_grey else "RGB") for name, files in found.items()}


def _list_folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    names = [entry.name for entry in _list_folders(folder)]
    if unknown := [name for name in names if name not in classes]:
        raise PlywiseError(f"{folder} has a class {unknown[0]!r} that training has not.", see="error-data")
    files = [
        (file, classes.index(name))
        for name in names
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in ENDINGS
    ]
    if not files:
        raise PlywiseError(
            f"{folder} holds no images in folders, one for each class ({', '.join(ENDINGS)}).",
            see="error-data",
        )
    return files


def _open(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise PlywiseError(
            "Pillow, which reads images, is not installed: pip install pillow.", see="error-extra"
        ) from error
    try:
        return Image.open(file)
    except OSError as error:
        raise PlywiseError(f"{file} is no image that can be read: {error}.", see="error-data") from error


def _find_mode(file: Path) -> str:
    with _open(file) as image:
        return str(image.mode)


def _read_images(path: Path, files: list[tuple[Path, int]], mode: str) -> Split:
    pixels = []
    for file, _ in files:
        with _open(file) as image:
            pixels.append(np.asarray(image.convert(mode)))
        if pixels[-1].shape != pixels[0].shape:
            sizes = [" x ".join(map(str, each.shape[1::-1])) for each in (pixels[0], pixels[-1])]
            raise PlywiseError(
                f"{path}: {files[0][0].name} is {sizes[0]} pixels and {file.name} {sizes[1]}. Resize them, "
                "or give a DataLoader whose transforms do.",
                see="error-data",
            )
    x = torch.from_numpy(np.stack(pixels))
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return Split(x.float() / 255, torch.tensor([number for _, number in files]))
