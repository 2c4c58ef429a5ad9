"""Photographs -> RealSR-like scene folders, captured by simulated cameras at several scales.

    python jobs/simulate_scenes.py input=photos output=runs/scenes cameras=[canon]

writes output/Canon/Train/2/Canon_001_HR.png, Canon_001_LR2.png, output/Canon/Test/1.532/Canon_003_LR1.532.png, ...
Each photograph goes to one camera only, and to either Train or Test.
"""

from degflow.capture.simulate import SimulateConfig, simulate_scenes
from degflow.config import run

if __name__ == "__main__":
    run(simulate_scenes, SimulateConfig, __doc__)
