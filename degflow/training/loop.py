"""fit(): one training loop on Accelerate for any objective.

The samples of a step follow from seed and step alone: numbers `step * batch` to `step * batch + batch - 1` of an
endless sequence, however many processes share them. The learning rate follows from the step. So weights, optimiser
state, EMA and the step are all that a checkpoint needs, and a resumed training continues as if it had never stopped.
"""

import copy
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from degflow import config as configuration
from degflow import images
from degflow.models.precision import computing, differentiating
from degflow.storage import Place
from degflow.training.average import Average
from degflow.training.checkpoints import Checkpoints, part_for, stored_weights
from degflow.training.logs import QUARTER, Logs, Means, quarters
from degflow.training.processes import FINISH, Hosts, gathered, is_main_process, join, lost
from degflow.training.profile import profiling
from degflow.training.settings import FitConfig
from degflow.training.stopping import Notice, Shield, Stopped
from degflow.training.usage import memory_of, on_meta, rate_of, work_of

_EXACT = "fit.precision=float32"
POLL = 4  # steps after which the processes tell each other of signals


class Validation(NamedTuple):
    """Result of a validation: scalars by name, and a picture "H W 3" uint8 or None."""

    scalars: dict[str, float]
    picture: np.ndarray | None = None


class Progress(NamedTuple):
    """State of a training: finished steps, and the averaged network."""

    step: int
    network: nn.Module


def check_start(config: FitConfig, output: str, settings: Any) -> None:
    """Tell at once what `fit` would refuse after the samples are prepared, which may take hours.

    The arguments are those of `fit`. What only the networks show, other shapes or other frozen weights, `fit` tells.

    Raises:
        ValueError: a batch that the processes cannot share, a checkpoint of another configuration, or no file to start
            from.
        OSError: the output cannot be read.
    """
    _check_batch(config, int(os.environ.get("WORLD_SIZE", "1")))
    if is_main_process():
        checkpoints = Checkpoints(Place(output), config.keep)
        found = checkpoints.names()
        if found and config.resume == "auto":
            checkpoints.read(found[-1], configuration.plain(settings))
        elif config.start_from:
            stored_weights(config.start_from)


def _check_batch(config: FitConfig, processes: int) -> None:
    if config.batch % (processes * config.accumulate):
        rule = f"must be a multiple of processes x fit.accumulate = {processes} x {config.accumulate}"
        raise ValueError(f"fit.batch={config.batch}: {rule}")


def fit(
    objective: nn.Module,
    samples: Dataset[dict[str, Tensor]],
    config: FitConfig,
    output: str,
    settings: Any,
    validate: Callable[[nn.Module], Validation] | None = None,
    finish: Callable[[Progress], None] | None = None,
    data: str = "",
) -> Progress | None:
    """Train `objective.network`.

    Args:
        objective: called with a batch's fields as keywords, returns Losses; its `network` is trained and saved.
        samples: an endless map-style dataset of dicts of tensors.
        config: how to train.
        output: folder or URI for config.yaml, checkpoints, previews and logs.
        settings: the job's resolved configuration, saved as config.yaml; a resume with another one is refused.
        validate: called with the averaged network.
        finish: called with the result on the main process, to write the files of the training. The other processes wait
            for it, and fail if it fails, because a launcher starts only failed processes again.
        data: what a resume must find again, e.g. a digest of the scenes, wherever they are.

    Returns:
        On the main process the averaged network, in eval mode on the CPU; None on the others.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; the step was finished and saved. The process ends with exit code 75.
        ConnectionError: another process ended, or did not answer in time.
        ValueError: a bad setting, an unsuitable checkpoint, or a loss that is not finite.
        OSError: the output cannot be read or written.
    """
    accelerator = join(config.precision, config.timeout)
    _check_batch(config, accelerator.num_processes)
    with Notice() as notice, lost(f"fit.timeout={config.timeout}"):
        run = _Run(accelerator, objective, config, Place(output), settings, data)
        run.open()
        try:
            _train(run, samples, validate, notice)
        finally:
            run.close()
        accelerator.wait_for_everyone()
    result = Progress(run.step, run.averaged().cpu()) if accelerator.is_main_process else None
    if finish:
        _finish(run.hosts, finish, result)
    accelerator.end_training()
    return result


def without_training(config: FitConfig, network: nn.Module, finish: Callable[[Progress], None]) -> None:
    """What `fit` does after the last step, where there is nothing to train."""
    accelerator = join(config.precision, config.timeout)
    result = Progress(0, network) if accelerator.is_main_process else None
    _finish(Hosts(accelerator, config.timeout), finish, result)
    accelerator.end_training()


def _finish(hosts: Hosts, finish: Callable[[Progress], None], result: Progress | None) -> None:
    """The main process has the result and writes its files; the others wait."""
    if result:
        finish(result)
    with lost(str(FINISH)):
        hosts.meet()


def _train(
    run: "_Run",
    samples: Dataset[dict[str, Tensor]],
    validate: Callable[[nn.Module], Validation] | None,
    notice: Notice,
) -> None:
    """The loop over steps, with a progress bar on a terminal, or else a line every `log_every` steps."""
    config, main = run.config, run.accelerator.is_main_process
    terminal = sys.stderr.isatty()
    batches, counted, seconds = run.loader(samples), run.step, 0.0
    bar = tqdm(total=config.steps, initial=run.step, disable=not (main and terminal), unit="step")
    with bar, profiling(run.place, config.profile if main else 0) as timed:
        while run.step < config.steps:
            begun = time.perf_counter()
            parts = run.train_step(batches)
            seconds += time.perf_counter() - begun
            bar.update()
            timed()
            if parts:
                rate, waited = (run.step - counted) * config.batch / seconds, run.waited / seconds
                counted, seconds, run.waited = run.step, 0.0, 0.0
                shown = {n: value for n, value in parts.items() if n != "gradient_norm" and not n.startswith(QUARTER)}
                line = ", ".join(f"{name} {value:.4g}" for name, value in shown.items()) + f", {rate:.1f} images/s"
                bar.set_postfix_str(line)
                if main and not terminal:
                    print(f"step {run.step} of {config.steps}: {line}", flush=True)
                speed = {"images_per_s": rate, "data_wait": waited, **run.usage(rate)}
                run.log({**parts, "learning_rate": learning_rate(run.step - 1, config), **speed})
            if validate and main and run.due(config.validate_every):
                run.report(validate(run.averaged()))
            stop = run.hosts.largest(notice.given()) if run.due(POLL) or run.hosts.alone else 0
            if stop or run.due(config.save_every):
                run.save()
            if stop and run.step < config.steps:
                name = signal.Signals(stop).name
                run.accelerator.print(f"{name}: stopped and saved after step {run.step}; the same command continues")
                raise Stopped


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then the schedule, at a step counted from 0."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "halve":
        return config.learning_rate / 2 ** sum(8 * step >= eighths * config.steps for eighths in (4, 6, 7))
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    low, high = config.final_learning_rate, config.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class RankSampler(Sampler[int]):
    """The sample numbers of one process: its part of the global batch of every step, from `step` on."""

    def __init__(self, config: FitConfig, step: int, rank: int, processes: int):
        super().__init__()
        self.config, self.step, self.rank, self.processes = config, step, rank, processes

    def __iter__(self) -> Iterator[int]:
        share = self.config.batch // self.processes
        for step in range(self.step, self.config.steps):
            first = step * self.config.batch + self.rank * share
            yield from range(first, first + share)


class _Run:
    """The state of one training; nothing else changes it."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        config: FitConfig,
        place: Place,
        settings: Any,
        data: str,
    ):
        self.accelerator, self.config, self.place, self.settings = accelerator, config, place, settings
        self.step = 0
        self.network: nn.Module = objective.network  # type: ignore[assignment]
        trainable, on_gpu = [p for p in self.network.parameters() if p.requires_grad], accelerator.device.type == "cuda"
        adam = torch.optim.Adam(trainable, lr=config.learning_rate, betas=config.betas, fused=on_gpu or None)
        self.frozen, self.data = _digest(objective), data
        self.rate, self.work = rate_of(accelerator.device, config.precision), 0.0  # the second one of an image, in FLOP
        self.shadow = on_meta(objective) if self.rate else None
        if config.compile:
            objective.compile()
        self.objective, self.optimizer = accelerator.prepare(objective, adam)
        self.average = Average(self.network, config.ema)
        self.means, self.hosts = Means(accelerator), Hosts(accelerator, config.timeout)
        self.waited = 0.0  # seconds, for data, since the last log line
        self.logs: Logs | None = None
        self.checkpoints = Checkpoints(place, config.keep)
        self.shield = Shield()

    def open(self) -> None:
        """Resume from the newest checkpoint of the same configuration, or begin; write config.yaml.

        Raises:
            ValueError: the checkpoint is unreadable or of another configuration, or the processes find different ones.
        """
        found = self.checkpoints.names()
        if found and self.config.resume == "auto":
            self._restore(found[-1])
        elif self.config.start_from:
            self._start_from(self.config.start_from)
        steps = gathered(self.accelerator, self.step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"output={self.place.uri}: the processes find checkpoints of different steps {steps}; "
                "it must be a folder that all machines share, or an object store"
            )
        if self.accelerator.is_main_process:
            if found and self.config.resume == "never":
                # Otherwise a later resume=auto could pick an old run's checkpoint of a higher step.
                count = self.checkpoints.clear()
                print(f"fit.resume=never: removed {count} checkpoint(s) of an earlier run in {self.place.uri}")
            self.place.write("config.yaml", configuration.dump(self.settings).encode())
            self.logs = Logs(self.place, self.step)

    def close(self) -> None:
        """Close the logs, and let the loader's workers end."""
        self.shield.end()
        if self.logs:
            self.logs.close()

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
                worker_init_fn=self.shield,
            )
        )

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimiser step; returns what this step logs: means over the global batches since the last log line."""
        self._seed()
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        device, totals = self.accelerator.device, {}
        for micro in range(self.config.accumulate):
            begun = time.perf_counter()
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
            self.waited += time.perf_counter() - begun
            if self.shadow:
                images_here = self.config.batch // self.accelerator.num_processes // self.config.accumulate
                self.work, self.shadow = work_of(self.shadow.train(), batch, self.config.precision) / images_here, None
            with _synchronised(self.accelerator, self.objective, micro == self.config.accumulate - 1):
                with computing(self.config.precision, device.type):
                    losses = self.objective(**batch)
                with differentiating(self.config.precision):
                    self.accelerator.backward(losses.total / self.config.accumulate)
            for name, value in (losses.parts | quarters(losses.by_time)).items():
                totals[name] = totals.get(name, 0) + value / self.config.accumulate
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.clip or math.inf)
        totals["gradient_norm"] = cast(Tensor, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.step)
        self.means.add(totals)
        return self._means() if self.due(self.config.log_every) else {}

    def _means(self) -> dict[str, float]:
        means = self.means.take()
        losses = {name: value for name, value in means.items() if name != "gradient_norm"}
        if not all(math.isfinite(value) for value in losses.values()):
            raise ValueError(f"step {self.step}: the loss is {losses}; lower fit.learning_rate or use {_EXACT}")
        return means

    def _seed(self) -> None:
        # So that what a network draws from the global generator repeats after a resume. It differs between processes;
        # degflow's own networks draw nothing from it.
        sequence = np.random.SeedSequence((self.config.seed, self.step, self.accelerator.process_index))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def due(self, every: int) -> bool:
        """Whether the step is a multiple of `every`, or the last."""
        return self.step % every == 0 or self.step == self.config.steps

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.average.state)
        return network.eval()

    def usage(self, rate: float) -> dict[str, float]:
        """`mfu` at this rate of images, where work and GPU are known, and `memory_gb` of a GPU."""
        share = rate / self.accelerator.num_processes * self.work / (1e12 * self.rate) if self.rate else 0.0
        return ({"mfu": share} if share else {}) | memory_of(self.accelerator.device)

    def log(self, scalars: dict[str, float]) -> None:
        """Write scalars to the logs."""
        if self.logs:
            self.logs.add("train", scalars, self.step)

    def report(self, validation: Validation) -> None:
        """Write a validation to the terminal, the logs and previews/."""
        line = ", ".join(f"{name} {value:.3f}" for name, value in validation.scalars.items())
        tqdm.write(f"step {self.step}: {line}")
        if validation.picture is not None:
            self.place.write(f"previews/step-{self.step:08d}.png", images.encode_png(validation.picture))
        if self.logs:
            self.logs.add("validation", validation.scalars, self.step, validation.picture)
            self.logs.flush()

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest beyond `keep`.

        Raises:
            ValueError: the weights are not finite; the older checkpoints stay.
            OSError: the checkpoint cannot be written.
        """
        if not bool(torch.stack([tensor.isfinite().all() for tensor in self.network.state_dict().values()]).all()):
            raise ValueError(f"step {self.step}: the weights are not finite; lower fit.learning_rate or use {_EXACT}")
        unlogged = self.means.settle()
        if self.accelerator.is_main_process:
            assert self.logs
            self.logs.flush()  # a resumed run does not log these steps again
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "network": self.network.state_dict(),
                "ema": self.average.state,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "unlogged": unlogged,
                "settings": configuration.plain(self.settings),
                "frozen": self.frozen,
                "data": self.data,
            }
            self.checkpoints.write(self.step, state)
        self.accelerator.wait_for_everyone()

    def _restore(self, name: str) -> None:
        state = self.checkpoints.read(name, configuration.plain(self.settings), self.frozen, self.data)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.average.set(state["ema"])
        self.step, self.means.settled = state["step"], state["unlogged"]
        self.accelerator.print(f"resuming after step {self.step} ({self.place.uri_of(name)})")

    def _start_from(self, uri: str) -> None:
        weights = part_for(self.network, stored_weights(uri))
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:3]]
            raise ValueError(f"fit.start_from={uri}: holds another network ({' '.join(reasons)} ...)") from None
        self.average.set(self.network.state_dict())


def _digest(objective: nn.Module) -> str:
    """Fingerprint of the objective's parameters outside its network, e.g. those of a frozen network."""
    digest = hashlib.sha256()
    for name, parameter in objective.named_parameters():
        if not name.startswith("network."):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _synchronised(accelerator: Accelerator, objective: nn.Module, last: bool) -> Any:
    return torch.enable_grad() if last else accelerator.no_sync(objective)
