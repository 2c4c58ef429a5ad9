"""fit(): one training loop on Accelerate for any objective. It knows nothing of degradation.

What a step sees is a function of (seed, step, place in the global batch): sample number `step * batch + place` of an
endless sequence. The learning rate is a function of the step. A checkpoint is therefore weights, optimiser state, EMA
and the step, and a resumed training goes on as if it had never stopped.
"""

import hashlib
import io
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from degflow import config as configuration
from degflow import images
from degflow.config import option
from degflow.storage import Place, load_checkpoint, split_uri


@dataclass(frozen=True)
class FitConfig:
    """How to train."""

    steps: int = option(200_000, "optimiser steps")
    batch: int = option(16, "samples per step, over all processes")
    accumulate: int = option(1, "micro-batches per step in each process")
    learning_rate: float = option(1e-4, "at the first step; cosine to final_learning_rate at the last")
    final_learning_rate: float = option(1e-7, "at the last step")
    warmup: int = option(0, "steps of linear warm-up before the cosine")
    beta1: float = option(0.9, "Adam's first-moment decay")
    beta2: float = option(0.999, "Adam's second-moment decay")
    clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    ema: float = option(0.999, "decay of the averaged weights, which are the result; 0 does not average")
    precision: Literal["no", "fp16", "bf16"] = option("no", "mixed precision: no, fp16 or bf16")
    compile: bool = option(False, "torch.compile the objective")
    workers: int = option(2, "data loader processes per training process")
    seed: int = option(0, "decides initial weights, order, crops, flips, levels, times and dropout")
    log_every: int = option(50, "steps between log lines and TensorBoard scalars")
    validate_every: int = option(2000, "steps between validations (scalars and a picture); also at the end")
    save_every: int = option(2000, "steps between checkpoints; also at the end")
    keep: int = option(2, "checkpoints to keep")
    resume: Literal["auto", "never"] = option(
        "auto", "auto: go on from the newest checkpoint in output; never: drop its checkpoints and start over"
    )
    start_from: str = option(
        "", "checkpoint (checkpoints/step-N.pt) whose averaged weights replace the initial ones; same network"
    )

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log_every", "validate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "final_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must be above 0")
        for name in ("ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("clip", "warmup", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"fit.{name}={getattr(self, name)}: must not be negative")
        if self.batch % self.accumulate:
            raise ValueError(f"fit.batch={self.batch}: must be a multiple of fit.accumulate={self.accumulate}")


class Validation(NamedTuple):
    """What a validation found: scalars by name, and a picture "H W 3" uint8 or None."""

    scalars: dict[str, float]
    picture: np.ndarray | None = None


class Progress(NamedTuple):
    """Where a training stands: finished steps, and the averaged network."""

    step: int
    network: nn.Module


def fit(
    objective: nn.Module,
    samples: Dataset[dict[str, Tensor]],
    config: FitConfig,
    output: str,
    settings: Any,
    validate: Callable[[nn.Module], Validation] | None = None,
) -> Progress | None:
    """Train `objective.network`.

    Args:
        objective: called with a batch's fields as keywords, returns Losses; its `network` is what is trained and saved.
        samples: an endless map-style dataset of dicts of tensors.
        config: how to train.
        output: folder or URI for config.yaml, checkpoints, previews and (local only) TensorBoard logs.
        settings: the job's resolved configuration, saved as config.yaml; a resume with another one is refused.
        validate: called with the averaged network.

    Returns:
        On the main process the averaged network, in eval mode on the CPU; None on the others.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    _check_launch(accelerator, config)
    run = _Run(accelerator, objective, config, Place(output), settings)
    run.open()
    try:
        _train(run, samples, validate)
    finally:
        run.close()
    accelerator.wait_for_everyone()
    result = Progress(run.step, run.averaged().cpu()) if accelerator.is_main_process else None
    accelerator.end_training()
    return result


def _check_launch(accelerator: Accelerator, config: FitConfig) -> None:
    if config.batch % (accelerator.num_processes * config.accumulate):
        raise ValueError(
            f"fit.batch={config.batch}: must be a multiple of processes x fit.accumulate = "
            f"{accelerator.num_processes} x {config.accumulate}"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate launch --gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: "
            "leave it at 1 and set fit.accumulate"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate launch with {accelerator.distributed_type.value}: only data parallelism (DDP) works"
        )


def _train(
    run: "_Run", samples: Dataset[dict[str, Tensor]], validate: Callable[[nn.Module], Validation] | None
) -> None:
    """The loop over steps; a terminal gets a progress bar, a log file a line every `log_every` steps."""
    config, main = run.config, run.accelerator.is_main_process
    terminal = sys.stderr.isatty()
    batches, counted, seconds = run.loader(samples), run.step, 0.0
    with tqdm(total=config.steps, initial=run.step, disable=not (main and terminal), unit="step") as bar:
        while run.step < config.steps:
            begun = time.perf_counter()
            parts = run.train_step(batches)
            seconds += time.perf_counter() - begun
            bar.update()
            if parts:
                rate = (run.step - counted) * config.batch / seconds
                counted, seconds = run.step, 0.0
                line = ", ".join(f"{name} {value:.4g}" for name, value in parts.items()) + f", {rate:.1f} images/s"
                bar.set_postfix_str(line)
                if main and not terminal:
                    print(f"step {run.step} of {config.steps}: {line}", flush=True)
                run.log({**parts, "learning_rate": learning_rate(run.step - 1, config), "images_per_s": rate})
            if validate and main and run.due(config.validate_every):
                run.report(validate(run.averaged()))
            if run.due(config.save_every):
                run.save()


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate to final_learning_rate, at a step counted from 0."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    low, high = config.final_learning_rate, config.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class RankSampler(Sampler[int]):
    """The sample numbers of one process: its part of every step's global batch, from `step` on."""

    def __init__(self, config: FitConfig, step: int, rank: int, processes: int):
        super().__init__()
        self.config, self.step, self.rank, self.processes = config, step, rank, processes

    def __iter__(self) -> Iterator[int]:
        share = self.config.batch // self.processes
        for step in range(self.step, self.config.steps):
            first = step * self.config.batch + self.rank * share
            yield from range(first, first + share)


class _Run:
    """The state of one training, and the only code that writes it."""

    def __init__(self, accelerator: Accelerator, objective: nn.Module, config: FitConfig, place: Place, settings: Any):
        self.accelerator, self.config, self.place, self.settings = accelerator, config, place, settings
        self.step = 0
        self.network: nn.Module = objective.network  # type: ignore[assignment]
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        adam = torch.optim.Adam(trainable, lr=config.learning_rate, betas=(config.beta1, config.beta2))
        self.frozen = _digest(objective)
        if config.compile:
            objective.compile()
        self.objective, self.optimizer = accelerator.prepare(objective, adam)
        self.ema = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.writer: Any = None

    def open(self) -> None:
        """Continue from the newest checkpoint of the same configuration, or begin; write config.yaml.

        Raises:
            ValueError: the checkpoint is of another configuration or unreadable, or processes see different ones.
        """
        found = self._checkpoints()
        if found and self.config.resume == "auto":
            self._restore(found[-1])
        elif self.config.start_from:
            self._start_from(self.config.start_from)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device))
        if len(set(steps.tolist())) > 1:  # type: ignore[union-attr]
            raise ValueError(
                f"output={self.place.uri}: the processes find checkpoints of different steps {steps.tolist()}; "  # type: ignore[union-attr]
                "it must be a folder that all machines share, or an object store"
            )
        if self.accelerator.is_main_process:
            if found and self.config.resume == "never":
                # A later run with resume=auto must not take a stale checkpoint of a higher step for this run's.
                for name in found:
                    self.place.delete(name)
                print(f"fit.resume=never: removed {len(found)} checkpoint(s) of an earlier run in {self.place.uri}")
            self.place.write("config.yaml", configuration.dump(self.settings).encode())
            self.writer = _tensorboard(self.place, self.step)

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self.writer:
            self.writer.close()

    def loader(self, samples: Dataset[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of this process, from the current step on."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return iter(
            DataLoader(
                samples,
                batch_size=self.config.batch // processes // self.config.accumulate,
                sampler=RankSampler(self.config, self.step, rank, processes),
                num_workers=self.config.workers,
                pin_memory=self.accelerator.device.type == "cuda",
                persistent_workers=False,
                worker_init_fn=_ignore_interrupts,
            )
        )

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimiser step; returns the losses' parts (means over the global batch) when they are to be logged."""
        self._seed()
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        totals: dict[str, Tensor] = {}
        for micro in range(self.config.accumulate):
            batch = {k: v.to(self.accelerator.device, non_blocking=True) for k, v in next(batches).items()}
            last = micro == self.config.accumulate - 1
            with self.accelerator.autocast(), _synchronised(self.accelerator, self.objective, last):
                losses = self.objective(**batch)
                self.accelerator.backward(losses.total / self.config.accumulate)
            for name, value in losses.parts.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / self.config.accumulate
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._average()
        if self.step % self.config.log_every and self.step != self.config.steps:
            return {}
        parts = {name: float(self.accelerator.reduce(value, "mean")) for name, value in totals.items()}  # type: ignore
        if not all(math.isfinite(value) for value in parts.values()):
            raise ValueError(f"step {self.step}: the loss is {parts}; lower fit.learning_rate or use precision=no")
        return parts

    def _seed(self) -> None:
        # Dropout is a function of (seed, step, process), so that a resumed step is the step that would have been.
        sequence = np.random.SeedSequence((self.config.seed, self.step, self.accelerator.process_index))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due."""
        return self.step % every == 0 or self.step == self.config.steps

    @torch.no_grad()
    def _average(self) -> None:
        # The first steps average over what there is, so that the initial weights are soon forgotten.
        decay = min(self.config.ema, self.step / (self.step + 10))
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                self.ema[name].lerp_(tensor, 1 - decay)
            else:
                self.ema[name].copy_(tensor)

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        network = type(self.network)(self.network.config).to(self.accelerator.device)  # type: ignore[operator, arg-type]
        network.load_state_dict(self.ema)
        return network.eval()

    def log(self, scalars: dict[str, float]) -> None:
        """Scalars to TensorBoard."""
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, self.step)

    def report(self, validation: Validation) -> None:
        """A validation to the terminal, TensorBoard and previews/."""
        line = ", ".join(f"{name} {value:.3f}" for name, value in validation.scalars.items())
        tqdm.write(f"step {self.step}: {line}")
        if validation.picture is not None:
            self.place.write(f"previews/step-{self.step:08d}.png", images.encode_png(validation.picture))
        if self.writer:
            for name, value in validation.scalars.items():
                self.writer.add_scalar(f"validation/{name}", value, self.step)
            if validation.picture is not None:
                self.writer.add_image("validation", validation.picture, self.step, dataformats="HWC")
            self.writer.flush()

    def save(self) -> None:
        """Write a checkpoint as one object, then drop the oldest beyond `keep`.

        Raises:
            ValueError: the weights are not finite; the checkpoints written before stay.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in self.network.state_dict().values()):
            raise ValueError(
                f"step {self.step}: the weights are not finite; lower fit.learning_rate or use precision=no"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if self.writer:
                self.writer.flush()  # a continuation logs nothing up to this step again
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "network": self.network.state_dict(),
                "ema": self.ema,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "settings": configuration.plain(self.settings),
                "frozen": self.frozen,
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self.place.write(f"checkpoints/step-{self.step:08d}.pt", buffer.getvalue())
            for name in self._checkpoints()[: -self.config.keep]:
                self.place.delete(name)
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[str]:
        keys = [source.key for source in self.place.files("checkpoints")]
        return [key for key in keys if re.fullmatch(r"checkpoints/step-\d+\.pt", key)]

    def _restore(self, name: str) -> None:
        uri = self.place.uri_of(name)
        state = _read_checkpoint(self.place, name)
        advice = "use the same configuration, another output, or fit.resume=never"
        if differing := sorted(_differences(state["settings"], configuration.plain(self.settings))):
            raise ValueError(f"{uri}: was made with another {', '.join(differing)}; {advice}")
        if state.get("frozen", self.frozen) != self.frozen:
            raise ValueError(f"{uri}: was made with other frozen weights under the same file names; {advice}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.ema = {key: tensor.to(self.accelerator.device) for key, tensor in state["ema"].items()}
        self.step = state["step"]
        self.accelerator.print(f"resuming after step {self.step} ({uri})")

    def _start_from(self, uri: str) -> None:
        if uri.endswith(".safetensors"):
            tensors, _, _ = load_checkpoint(uri)
            weights = _part_for(self.network, tensors)
        else:
            weights = _read_checkpoint(*split_uri(uri))["ema"]
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:3]]
            raise ValueError(f"fit.start_from={uri}: holds another network ({' '.join(reasons)} ...)") from None
        self.ema = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the training process alone says what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _part_for(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of this network in a file that may hold several, each under a prefix of its own."""
    names = network.state_dict().keys()
    prefixes = ["", *sorted({name.partition(".")[0] + "." for name in tensors})]
    best = max(prefixes, key=lambda prefix: sum(prefix + name in tensors for name in names))
    return {name.removeprefix(best): tensor.float() for name, tensor in tensors.items() if name.startswith(best)}


def _read_checkpoint(place: Place, name: str) -> dict[str, Any]:
    """Read what `_Run.save` wrote; nothing in the file can run code."""
    try:
        state = torch.load(io.BytesIO(place.read(name)), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{place.uri_of(name)}: no such file") from None
    except OSError:
        raise
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, KeyError, ... on damage
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{place.uri_of(name)}: not a readable training checkpoint ({reason})") from None
    wanted = {"step", "network", "ema", "optimizer", "scaler", "settings"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise ValueError(f"{place.uri_of(name)}: not a training checkpoint (those are called checkpoints/step-N.pt)")
    return state


def _digest(objective: nn.Module) -> str:
    """Fingerprint of the parameters that the objective holds beside its network, e.g. those of a frozen network."""
    digest = hashlib.sha256()
    for name, parameter in objective.named_parameters():
        if not name.startswith("network."):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# What may change between a run and its continuation.
_FREE = re.compile(
    r"fit\.(workers|log_every|validate_every|save_every|keep|resume|compile|accumulate)|scenes\.cache|output|validation|half"
)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in old.keys() | new.keys():
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
        elif a != b and not _FREE.fullmatch(name):
            yield f"{name} ({a} then, {b} now)"


def _synchronised(accelerator: Accelerator, objective: nn.Module, last: bool) -> Any:
    return torch.enable_grad() if last else accelerator.no_sync(objective)


def _tensorboard(place: Place, step: int) -> Any:
    if not place.local:
        print("TensorBoard logs are written for local outputs only")
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print('no TensorBoard logs: pip install "degflow[train]" adds them')
        return None
    # What an interrupted run logged beyond its last checkpoint is superseded.
    return SummaryWriter(place.path("logs"), purge_step=step + 1)
