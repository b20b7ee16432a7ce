"""Mixtures of images that a mask can be computed on: of tasks, or of no task at all.

A source is named by its parts, joined by ``+``. A part is a task (``"mnist5k"``), a task with
shuffled labels (``"mnist5k:random_labels"``), altered copies of a task's images
(``"mnist5k:altered"``), or a set of images that belong to no task, of :data:`IMAGE_SETS`
(``"photographs"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pai_utils.data.images import ImageDataset, ImageTransform
from pai_utils.support.common import unknown_name
from pai_utils.support.sampling import Draw

RANDOM_LABELS = ":random_labels"
ALTERED = ":altered"
UNLABELLED_IMAGES = 512  # of each part of a mixture without any task
MOST_POOLED = 2048  # of each part of a mixture: ample for any score or repair
_RAW_SIDE = 96


def source_parts(name: str, tasks: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The parts of a source's name; ``tasks`` are those that may be among them.

    Raises:
        ValueError: for an unknown part, or one named twice.

    Examples:
        >>> from pai_utils.data.mixtures import source_parts
        >>> source_parts("digits+mnist5k:altered+noise", tasks=["digits", "mnist5k"])
        ['digits', 'mnist5k:altered', 'noise']
    """
    parts = [name] if name in tasks else name.split("+")
    for part in parts:
        if part not in IMAGE_SETS and task_of(part) not in tasks:
            raise unknown_name("source", part, [*tasks, *IMAGE_SETS])
    if len(set(parts)) < len(parts):
        raise ValueError(f"source {name!r} names a part twice")
    return parts


def task_of(part: str) -> str:
    """The task that a part of a source's name speaks of."""
    return part.removesuffix(RANDOM_LABELS).removesuffix(ALTERED)


def is_held_out(task: str, source: str) -> bool:
    """Whether a mask of ``source`` saw none of the task's images."""
    return task != source and task not in map(task_of, source.split("+"))


def load_mixture(
    name: str,
    tasks: Mapping[str, ImageDataset],
    transform: ImageTransform,
    *,
    count: int = UNLABELLED_IMAGES,
    seed: int = 0,
) -> ImageDataset:
    """Pool equally many images of each part of a source; all labels are -1.

    Each part gives ``count`` images if none of them is a task, else as many as the smallest of its
    ``tasks`` (training images by name) has, up to 2,048. The ``seed`` is of all that is drawn.

    Raises:
        ValueError: for an unknown part, one named twice, or fewer images than one.
    """
    parts = source_parts(name, tasks)
    own = {part: tasks[task_of(part)] for part in parts if part not in IMAGE_SETS}
    if own:
        count = min(MOST_POOLED, *map(len, own.values()))
    draw = Draw(count, seed=seed)
    pooled = []
    for part in parts:
        if part in IMAGE_SETS:
            drawn = IMAGE_SETS[part](count, np.random.default_rng(seed))
            pooled.append(transform.resize(drawn))
        elif part.endswith(ALTERED):
            pooled.append(_altered(own[part].images, count, np.random.default_rng(seed)))
        else:
            pooled.append(own[part].images[draw.indices(own[part])])
    images = torch.cat(pooled)
    return ImageDataset(images, torch.full((len(images),), -1), transform)


def _altered(images: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Copies turned, scaled, sheared and recoloured, so that strokes and edges vary."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    copies = []
    for index in random.permutation(len(images))[:count]:
        image = images[int(index)].float()
        image = functional.affine(
            image,
            angle=random.uniform(-30, 30),
            translate=[0, 0],
            scale=math.exp(random.uniform(math.log(0.4), math.log(2))),
            shear=[random.uniform(-15, 15), 0.0],
            interpolation=InterpolationMode.BILINEAR,
            fill=image[:, 0, 0].tolist(),  # the paper goes on where the image ends
        )
        copies.append(_recoloured(image, random))
    return torch.stack(copies)


def _photographs(count: int, random: np.random.Generator, most: int = 2) -> Tensor:
    """Crops of scikit-learn's two photographs, in other sizes, colours and contrasts.

    One photograph, so altered, goes far in the early layers of a network (Asano et al. 2020, "A
    critical analysis of self-supervision, or what we can learn from a single image").
    """
    from sklearn.datasets import load_sample_images
    from torchvision.transforms.v2 import functional

    images = load_sample_images().images[:most]
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() for image in images]
    crops: list[Tensor] = []
    while len(crops) < count:
        photograph = photographs[len(crops) % len(photographs)]
        height, width = photograph.shape[1:]
        side = round(math.exp(random.uniform(math.log(24), math.log(min(height, width)))))
        top = int(random.integers(height - side + 1))
        left = int(random.integers(width - side + 1))
        crop = functional.resized_crop(
            photograph, top, left, side, side, [_RAW_SIDE, _RAW_SIDE], antialias=True
        )
        recoloured = _recoloured(crop, random)
        if recoloured.float().std() >= 10:  # a piece of sky, or of white, says nothing
            crops.append(recoloured)
    return torch.stack(crops)


def _recoloured(image: Tensor, random: np.random.Generator) -> Tensor:
    """Mirror at random; change brightness, contrast, saturation, hues; seldom invert."""
    if random.random() < 0.5:
        image = image.flip(2)
    image = image * random.uniform(0.6, 1.4)
    mean = image.mean()
    image = (image - mean) * random.uniform(0.6, 1.4) + mean
    grey = image.mean(0, keepdim=True)
    image = grey + (image - grey) * (random.uniform(0, 1.3) if random.random() < 0.8 else 0.0)
    if random.random() < 0.3:
        image = image[torch.from_numpy(random.permutation(3))]
    if random.random() < 0.15:
        image = 255 - image
    return image.round().clamp(0, 255).to(torch.uint8)


def _leaves(count: int, random: np.random.Generator) -> Tensor:
    """Dead leaves: discs that hide each other, their radii r of density r⁻³.

    Their statistics are those of natural images at all scales (Lee, Mumford & Huang 2001,
    "Occlusion models for natural images"); networks learn from them (Baradad et al. 2021,
    "Learning to see by looking at noise").
    """
    side, discs = 64, 120
    images = np.zeros((count, side, side, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for _ in range(discs):
        radii = random.uniform((side / 2) ** -2, 2.0**-2, size=count) ** -0.5  # of 2 pixels or more
        centres = random.uniform(0, side, size=(2, count))
        colours = random.integers(256, size=(count, 3), dtype=np.uint8)
        drawn = zip(images, radii, *centres, colours, strict=True)
        for image, radius, row, column, colour in drawn:
            image[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = colour
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _contours(count: int, random: np.random.Generator) -> Tensor:
    """Outlines of up to three ragged polygons, each drawn a few times in growing sizes.

    Pre-training on such images alone rivals ImageNet (Kataoka et al. 2022, "Replacing labeled
    real-image datasets with auto-generated contours"). Their strokes on an even ground are what
    photographs lack.
    """
    from PIL import Image, ImageDraw

    images = []
    for _ in range(count):
        ground, *inks = random.integers(256, size=(4, 3)).tolist()
        canvas = Image.new("RGB", (_RAW_SIDE, _RAW_SIDE), tuple(ground))
        pen = ImageDraw.Draw(canvas)
        for ink in inks[: random.integers(1, 4)]:
            corners = int(random.integers(3, 40))
            angles = np.arange(corners + 1) * 2 * np.pi / corners + random.uniform(0, 2 * np.pi)
            ragged = 1 + random.uniform(0, 0.6) * random.uniform(-1, 1, size=corners)
            radii = np.append(ragged, ragged[0]) * random.uniform(6, 24)
            centre = random.uniform(0.25, 0.75, size=(2, 1)) * _RAW_SIDE
            stretch = random.uniform(0.5, 1.5, size=(2, 1))
            outline = radii * np.stack([np.cos(angles), np.sin(angles)]) * stretch
            width = int(random.integers(1, 9))
            for size in 1 + 0.35 * np.arange(random.integers(1, 4)):
                points = [(float(x), float(y)) for x, y in (centre + outline * size).T]
                pen.line(points, fill=tuple(ink), width=width, joint="curve")
        drawn = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float()
        images.append(_recoloured(drawn, random))
    return torch.stack(images)


def _noise(count: int, random: np.random.Generator) -> Tensor:
    values = random.normal(127.5, 64, size=(count, 64, 64, 3))
    return torch.from_numpy(values.round().clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


IMAGE_SETS: dict[str, Callable[[int, np.random.Generator], Tensor]] = {
    "photographs": _photographs,
    "one_photograph": partial(_photographs, most=1),
    "leaves": _leaves,
    "contours": _contours,
    "noise": _noise,
}
"""What draws images that belong to no task, uint8 [count, 3, S, S], by name: altered crops of two
photographs, or of one; discs that hide each other; outlines of polygons; white Gaussian noise."""
