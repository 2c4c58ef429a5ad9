"""The `degflow` command, which is also `python -m degflow`; the scripts in `jobs/` start the same functions.

Each function in `COMMANDS` is a command. Its docstring is what `--help` says; the first line also stands in the list
of commands. It returns the function that does the work, and the class of its configuration. It imports both itself, so
that no command waits for the packages of another.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from degflow import __version__, config

Command = Callable[[], tuple[Callable[[Any], None], type]]


def synthesize():
    """HR photographs -> a dataset of LR images at random, continuous degradation scales.

        degflow synthesize input=photos output=runs/dataset
        ray job submit --runtime-env cluster/ray/runtime_env.yaml -- python jobs/synthesize.py input=s3://... output=s3://...

    It joins a running Ray cluster (RAY_ADDRESS), or starts Ray on this machine. The same command continues a run that
    was stopped, and leaves a finished dataset as it is.
    """
    from degflow.synthesis.run import synthesize
    from degflow.synthesis.settings import SynthesizeConfig

    return synthesize, SynthesizeConfig


def export():
    """A finished dataset -> folders or tars that SR trainers read.

        degflow export input=runs/dataset output=runs/paired                                   # gt/, lq/, meta_info
        degflow export input=s3://bucket/dataset output=runs/tars layout=webdataset
        degflow export input=runs/dataset output=runs/tree layout=realsr 'labels={2: 2.0, 3: 3.0, 4: 4.0}'

    The same command continues an export that was stopped, and leaves a finished one as it is.
    """
    from degflow.dataset.exports import ExportConfig, export

    return export, ExportConfig


def simulate_scenes():
    """Photographs -> RealSR-like scene folders, captured by simulated cameras at several scales.

        degflow simulate-scenes input=photos output=runs/scenes 'cameras=[canon]'

    writes output/Canon/Train/2/Canon_001_HR.png, Canon_001_LR2.png, output/Canon/Test/1.532/Canon_003_LR1.532.png, ...
    Each photograph goes to one camera only, and to either Train or Test.
    """
    from degflow.capture.simulate import SimulateConfig, simulate_scenes

    return simulate_scenes, SimulateConfig


def train_rae():
    """Stage 1: train the residual autoencoder on a RealSR-like tree.

        degflow train-rae config=small_rae scenes.data=runs/scenes/Canon/Train output=runs/rae
        accelerate launch -m degflow train-rae config=...     # on several GPUs

    writes output/rae.safetensors. The validation lines show the PSNR of `decode(encode(LR))` against LR. It must become
    higher than the PSNR of the image that gives the decoder its features: HR, or HR after the optics with skips=optics.
    Otherwise the decoder ignores the latent.

    After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
    exit code 75 (accelerate's launcher turns every code but 0 into 1).
    """
    from degflow.training.rae import TrainRAEConfig, train_rae

    return train_rae, TrainRAEConfig


def train_residual():
    """Stage 2 of the method that draws LR images: train the residual flow on a RealSR-like tree, stage 1 frozen.

        degflow train-residual config=small_residual scenes.data=runs/scenes/Canon/Train \\
            rae=runs/rae/rae.safetensors output=runs/residual
        accelerate launch -m degflow train-residual config=...     # on several GPUs

    writes ONE file, output/degrader.safetensors, for `degflow synthesize model=...` and `Degrader.load`. Stage 1 must
    have been trained with skips=optics.

    After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
    exit code 75 (accelerate's launcher turns every code but 0 into 1).
    """
    from degflow.training.residual import TrainResidualConfig, train_residual

    return train_residual, TrainResidualConfig


def train_lfm():
    """Stage 2 of the published method: train the latent flow on a RealSR-like tree, stage 1 frozen.

        degflow train-rae config=small_rae skips=hr 'scenes.reductions=[1.0]' scenes.data=runs/scenes/Canon/Train \\
            output=runs/rae-hr
        degflow train-lfm config=small_lfm scenes.data=runs/scenes/Canon/Train \\
            rae=runs/rae-hr/rae.safetensors output=runs/lfm
        accelerate launch -m degflow train-lfm config=...     # on several GPUs

    writes ONE file, output/degrader.safetensors, for `degflow synthesize model=...` and `Degrader.load`. Stage 1 must
    have been trained with skips=hr and without reductions, as the first command does.

    After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
    exit code 75 (accelerate's launcher turns every code but 0 into 1).
    """
    from degflow.training.lfm import TrainLFMConfig, train_lfm

    return train_lfm, TrainLFMConfig


def fit_optics():
    """Give a degrader the optics of another camera, fitted on one or more of its scenes, in seconds.

        degflow fit-optics data=scenes/Train output=runs/mine/degrader.safetensors

    writes a degrader file and prints how close the optics come to captured LR images, before and now. The networks and
    the noise stay as they are. Compare both degraders by `degflow evaluate`, on other scenes of the camera.
    """
    from degflow.training.optics import FitOpticsConfig, fit_optics

    return fit_optics, FitOpticsConfig


def import_released():
    """The authors' two released weight files -> one degrader file, as degflow reads it.

        degflow import-released autoencoder=AE.pth flow=FLOW.pth output=runs/released/degrader.safetensors

    The released architecture may have any width and depth. Safetensors files with the same names are read too. Only
    tensors are read from a file: a pickle that would run code is refused.
    """
    from degflow.training.released import ImportConfig, import_released

    return import_released, ImportConfig


def evaluate():
    """Compare a degrader's LR images, and simple baselines, with captured ones at seen and unseen scales.

        degflow evaluate data=runs/scenes/Canon/Test output=runs/fidelity

    writes output/table.md (means over the scenes), measurements.parquet (every image), draws.parquet, frechet.parquet,
    sweep.parquet (PSNR of every scene over a fine grid of scales, against HR and each captured level),
    best_times.parquet, figure.png (captured levels above generated images at even steps of t), closeups.png (captured
    beside drawn) and config.yaml.
    """
    from degflow.evaluation.run import EvaluateConfig, evaluate

    return evaluate, EvaluateConfig


def baseline_scenes():
    """Simple LR images as a RealSR-like tree, so that SR networks can be trained on them for comparison.

        degflow baseline-scenes data=runs/scenes/Nikon/Train output=runs/random/Train baseline=random
        degflow baseline-scenes data=runs/scenes/Canon/Train output=runs/spline/Train baseline=spline

    writes output/2.5/Nikon_001_HR.png, Nikon_001_LR2.5.png, ... for train-sr with the same `levels`. `spline` and
    `linear` use the captured levels of `data`; the other baselines use its HR images only.
    """
    from degflow.evaluation.baseline_scenes import BaselineScenesConfig, baseline_scenes

    return baseline_scenes, BaselineScenesConfig


def train_sr():
    """Train a super-resolution network on captured or generated pairs, and test it as the paper does.

        degflow train-sr config=paper_sr network.name=hat output=runs/hat \\
            'train={generated: runs/dataset}' 'test={canon: RealSR/Canon/Test, nikon: RealSR/Nikon/Test}'
        accelerate launch -m degflow train-sr config=...     # on several GPUs

    A source of `train` is one split of a RealSR-like tree, at `levels`, or a dataset that `synthesize` made. The job
    writes output/network.safetensors, table.md (means of each test tree), measurements.csv (every image) and a picture
    of each test tree. `degflow train-sr --help network.name=NAME` shows the keys of a network.

    After a stop, the same command continues from the last checkpoint. SIGTERM and SIGUSR1 save one and end the job with
    exit code 75 (accelerate's launcher turns every code but 0 into 1).
    """
    from degflow.restoration.settings import TrainSRConfig
    from degflow.restoration.training import train_sr

    return train_sr, TrainSRConfig


def protocol():
    """The paper's whole experiment by one command: degraders, datasets, SR networks, and a table.

        degflow protocol config=small_protocol photographs=photos output=runs/protocol

    1. A degrader and its ablations are trained on camera A's pairs (or given). Each is compared with captured LR.
    2. Each degrades the HR photographs of camera B.
    3. SR networks are trained on real and on generated pairs, and tested on the test level of both cameras.

    Each step, called a cell, is a run of another command, with its log in output/cells. Finished cells are not run
    again, so the same command continues after a stop. After each cell, output/table.md shows the results so far beside
    the published ones. results.csv has every single run.

    Keys such as `rae` and `lfm` are lists of arguments (KEY=VALUE) for the command that they name. Paths in them are
    relative to the current folder.
    """
    from degflow.protocol.run import ProtocolConfig, run_protocol

    return run_protocol, ProtocolConfig


def benchmark():
    """Measure speed: degflow beside the released procedure, training steps, the Ray job, codecs.

        degflow benchmark output=runs/benchmark

    prints Markdown tables and writes them to output/benchmark.md. It takes some minutes on two idle cores; quick=true
    only shows that everything runs. Measure on a machine that does nothing else.
    """
    from degflow.benchmarking.run import BenchmarkConfig, benchmark

    return benchmark, BenchmarkConfig


def explore():
    """A local page that shows what a degrader does to your own photograph.

        degflow explore photograph=photo.jpg

    prints the page's address. The page has a slider for the scale and a button for another draw. It shows HR, generated
    LR, bicubic, and HR with the optics' blur alone, side by side. Nothing leaves the machine.
    """
    from degflow.evaluation.explore.run import ExploreConfig, explore

    return explore, ExploreConfig


COMMANDS: dict[str, Command] = {  # in the order of the list
    command.__name__.replace("_", "-"): command
    for command in (
        synthesize,
        explore,
        export,
        simulate_scenes,
        train_rae,
        train_residual,
        train_lfm,
        fit_optics,
        import_released,
        evaluate,
        baseline_scenes,
        train_sr,
        protocol,
        benchmark,
    )
}


def start(command: Command, words: Sequence[str] | None = None) -> None:
    """Run a command with its words, by default those behind the script's name; see `degflow.config.run`."""
    work, schema = command()
    config.run(work, schema, inspect.getdoc(command), words)


def main(words: Sequence[str] | None = None) -> None:
    """Run `degflow WORDS`, by default those of the command line. The exit code is 2 for an unknown command."""
    first, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if first in config.HELP:
        config.show(listing())
    elif first == "--version":
        print(f"degflow {__version__}")
    elif first in COMMANDS:
        start(COMMANDS[first], rest)
    else:
        near = difflib.get_close_matches(first.lower().replace("_", "-"), COMMANDS, cutoff=0.5)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"error: {first!r}: no such command{meant} (degflow --help lists all)", file=sys.stderr)
        sys.exit(2)


def listing() -> str:
    """The text of `degflow --help`."""
    lines = [f"  {name:16} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["degflow COMMAND [KEY=VALUE ...]", *lines, "degflow COMMAND --help explains its keys."])


if __name__ == "__main__":
    main()
