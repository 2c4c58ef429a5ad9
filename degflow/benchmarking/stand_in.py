"""`python -m degflow.benchmarking.stand_in KEY=VALUE ...`: the synthesis job with a degrader that sleeps."""

import os
import sys
import time
from typing import Any

from torch import Tensor

from degflow.config import load
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.synthesis.settings import SynthesizeConfig


class StandIn(Degrader):
    """Sleeps for each image, and returns it for every scale."""

    def __init__(self, seconds: float):
        autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8))
        flow = PathFlow(VelocityNetwork(VelocityConfig(width=8, blocks=1)))
        super().__init__(autoencoder, flow, {"1": 1.0, "4": 4.0})
        self.seconds = seconds

    def forward(self, hr: Tensor, scale: Any, **options: Any) -> Tensor:
        """ "B 3 H W" and "B N" -> "B N 3 H W"."""
        time.sleep(self.seconds * len(hr))
        return hr[:, None].expand(-1, scale.shape[1], -1, -1, -1)


def main() -> None:
    """Run the job. Only the driver's `Degrader.load` is replaced; actors get the object that it returns."""
    from degflow.benchmarking import stand_in
    from degflow.synthesis.run import synthesize

    # By its importable name, because this file runs as __main__, which actors could not unpickle.
    degrader = stand_in.StandIn(float(os.environ["DEGFLOW_STAND_IN_SECONDS"]))
    Degrader.load = classmethod(lambda *_: degrader)  # type: ignore[method-assign]
    synthesize(load(SynthesizeConfig, sys.argv[1:]))


if __name__ == "__main__":
    main()
