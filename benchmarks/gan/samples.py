"""Images of a generator: from fixed latent vectors, between two of them, and as one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from retract.nets.parametrizations.models import shared_frames

from ..samples.metrics import to_bytes
from ..training import DivergedError

__all__ = [
    "BETWEEN",
    "GRID",
    "PATHS",
    "fixed_latents",
    "generate",
    "interpolated",
    "picture",
    "random_images",
    "save_picture",
]

BATCH = 250  # images generated at once
GRID = 8  # images a side
PATHS, BETWEEN = 8, 10  # interpolations, and images of each, ends included
SHORTEST_SIDE = 32  # pixels: smaller images are enlarged, pixel by pixel


def fixed_latents(latent: int, seed: int) -> dict[str, Tensor]:
    """Latent vectors that stay the same through a run, as are needed to compare its samples.

    Returns:
        ``"grid"`` (GRID * GRID, latent), standard normal, and ``"ends"`` (2, PATHS, latent), likewise.
    """
    random = torch.Generator().manual_seed(seed)
    return {
        "grid": torch.randn(GRID * GRID, latent, generator=random),
        "ends": torch.randn(2, PATHS, latent, generator=random),
    }


def interpolated(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """Points evenly along great arcs, lengths evenly between those of the ends.

    Normal vectors of many dimensions lie near a sphere, which a straight line would leave.

    Args:
        starts: (N, d), not zero.
        ends: (N, d), not zero, none opposite to its start.
        count: points of each arc, both ends included; at least 2.

    Returns:
        (N, count, d).

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, section 3.3.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    t = torch.linspace(0, 1, count, dtype=starts.dtype, device=starts.device)[:, None]
    lengths = [vectors.norm(dim=1)[:, None, None] for vectors in (starts, ends)]
    a, b = starts[:, None] / lengths[0], ends[:, None] / lengths[1]
    # The half angle from differences: exact for near vectors too, where an arc cosine of their product is not.
    angle = 2 * torch.atan2((a - b).norm(dim=2, keepdim=True), (a + b).norm(dim=2, keepdim=True))
    # sinc(x) = sin(pi x) / (pi x): weights stay finite where the angle vanishes.
    whole = torch.sinc(angle / torch.pi)
    directions = (
        (1 - t) * torch.sinc((1 - t) * angle / torch.pi) * a + t * torch.sinc(t * angle / torch.pi) * b
    ) / whole
    points: Tensor = directions * ((1 - t) * lengths[0] + t * lengths[1])
    return points


@torch.no_grad()
def generate(generator: nn.Module, latents: Tensor) -> Tensor:
    """Images of latent vectors (N, latent), uint8 of shape (N, C, H, W) on the CPU, in evaluation mode.

    The generator is left as it was.

    Raises:
        DivergedError: an image is not finite.
    """
    modes = {module: module.training for module in generator.modules()}
    generator.eval()
    device = next(generator.parameters()).device
    try:
        with shared_frames(generator):
            images = torch.cat([generator(batch.to(device)).float().cpu() for batch in latents.split(BATCH)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not images.isfinite().all():
        raise DivergedError("training diverged: generated images are not finite. Lower the learning rates")
    return to_bytes(images)


def random_images(generator: nn.Module, latent: int, count: int, seed: int) -> Tensor:
    """``count`` images of new standard normal latent vectors, the same for the same seed; as of `generate`."""
    random = torch.Generator().manual_seed(seed)
    return generate(generator, torch.randn(count, latent, generator=random))


def picture(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W), uint8, side by side in rows, one black pixel apart.

    Images of fewer than 32 pixels are enlarged by a whole number, and empty places are black.

    Returns:
        uint8 of shape (C, height, width).
    """
    scale = max(1, SHORTEST_SIDE // min(images.shape[2:]))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    places = images.new_zeros(rows * columns, channels, height + 1, width + 1)
    places[:count, :, :height, :width] = images
    joined = places.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    return joined.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]


def save_picture(image: Tensor, path: Path) -> None:
    """Write uint8 of shape (1 or 3, height, width) as a PNG file."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    Image.fromarray(pixels).save(path, format="PNG")
