"""explore: load a degrader, and serve the page until it is stopped."""

from dataclasses import dataclass

from degflow import images
from degflow.config import option
from degflow.degrader import Degrader
from degflow.evaluation.explore.comparison import SMALLEST_WINDOW, Explorer
from degflow.evaluation.explore.server import Server
from degflow.models.precision import check_device, device_of
from degflow.storage import split_uri


@dataclass(frozen=True)
class ExploreConfig:
    """Keys of explore."""

    model: str = option("shipped", "degrader file; shipped: the one that comes with degflow")
    photograph: str = option("", "file or URI that the page opens first; empty: none")
    port: int = option(7860, "port of the page, on 127.0.0.1; 0 picks a free one")
    window: int = option(320, "side in pixels of the part of a photograph that is worked on; larger takes longer")
    max_pixels: int = option(images.MAX_PIXELS, "largest accepted photograph, height x width")
    device: str = option("auto", "auto (cuda when there is one), cpu, cuda or cuda:N")

    def __post_init__(self):
        check_device(self.device)
        rules = (
            ("port", 0 <= self.port <= 65535, "must lie in [0, 65535]"),
            ("window", self.window >= SMALLEST_WINDOW, f"must be at least {SMALLEST_WINDOW}"),
            ("max_pixels", self.max_pixels >= images.SMALLEST_SIDE**2, f"must be at least {images.SMALLEST_SIDE**2}"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def explore(config: ExploreConfig) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        ValueError: no degrader, or a photograph that is not accepted.
        OSError: a photograph that cannot be read, or a port that is taken.
    """
    device = device_of(config.device)
    explorer = Explorer(Degrader.load(config.model, device), config.window, config.max_pixels)
    if config.photograph:
        place, name = split_uri(config.photograph)
        try:
            explorer.open(place.read(name), name)
        except images.ImageError as error:
            raise ValueError(f"photograph={config.photograph}: {error}") from None
    with Server(explorer, config.port) as server:
        print(f"open {server.url} in a browser on this machine; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
