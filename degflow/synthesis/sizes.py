"""How large the output of a file will be, judged from its planned name and size: this is what cuts shards by bytes.

A plan of millions of files opens none of them, so a file's pixels are guessed from its bytes. The guesses are meant to
be high rather than low, because a shard lies on its actor's disk until it is whole. Measured on examples/photographs,
of 0.14 to 0.27 megapixels: JPEG at 0.41 to 0.72 bytes per pixel; HR as PNG at 1.36 to 1.91; LR of the degrader that
ships as PNG at 1.04 to 1.46, and less at larger scales; WebP at 0.8 of PNG.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from degflow.dataset.plan import Part, Plan
from degflow.dataset.scales import scales_of
from degflow.synthesis.settings import SynthesizeConfig

pc: Any = pyarrow.compute  # its functions are made at import, where type checkers do not see them

_LOSSY = (".jpg", ".jpeg", ".webp")
# Cameras' JPEGs of many megapixels have 0.25 to 0.5 bytes per pixel, fewer than the small ones that were measured.
_PIXELS_PER_LOSSY_BYTE = 4.0
_PIXELS_PER_BYTE = 1 / 1.5  # PNG, TIFF
_HR_BYTES, _LR_BYTES = 1.6, 1.4  # per pixel, as PNG
_CODEC = {"png": 1.0, "webp": 0.8}
_SAMPLED = 1000  # photographs whose scales stand for those of all


def next_part(plan: Plan, sources: pa.Table, config: SynthesizeConfig) -> Part:
    """The plan's next part, in shards of at most `shard.images` files and an estimated `shard.bytes` of output.

    Args:
        plan: so far.
        sources: a table of SOURCE.
        config: resolved.
    """
    shard = config.shard
    if not shard.bytes:
        return plan.next_part(sources, shard.images)
    sizes = output_bytes(sources, config)
    sizes[sizes < 0] = shard.bytes // shard.images
    return plan.next_part(sources, shard.images, sizes, shard.bytes)


def output_bytes(sources: pa.Table, config: SynthesizeConfig) -> np.ndarray:
    """An estimate of the bytes of each file's rows, int64 "N"; -1 where the file's size is unknown."""
    sizes, lossy = sources["size"].to_numpy(), np.zeros(len(sources), bool)
    for suffix in _LOSSY:
        lossy |= pc.ends_with(sources["key"], suffix, ignore_case=True).to_numpy()
    pixels = np.minimum(sizes * np.where(lossy, _PIXELS_PER_LOSSY_BYTE, _PIXELS_PER_BYTE), config.max_pixels)
    return np.where(sizes < 0, -1, pixels * bytes_per_pixel(config)).astype(np.int64)


def bytes_per_pixel(config: SynthesizeConfig) -> float:
    """An estimate of the bytes of all rows of a photograph, for each of its pixels."""
    shrunk = 1.0
    if config.size == "scaled":
        scales = np.array([scales_of(config.scale, config.seed, str(n)) for n in range(_SAMPLED)])
        shrunk = float((scales**-2.0).mean())
    pngs = config.scale.per_image * _LR_BYTES * shrunk + (_HR_BYTES if config.hr == "embed" else 0.0)
    return pngs * _CODEC[config.codec]
