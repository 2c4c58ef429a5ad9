"""One run of the job, from its configuration to `_SUCCESS`."""

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

from degflow.config import dump, plain
from degflow.dataset.card import card, preview
from degflow.dataset.layout import CARD, CONFIG, PREVIEW, SUCCESS, Record, find_objects, is_leftover
from degflow.dataset.manifest import finished_shards, parts_in_manifest, rejects_of, write_manifest
from degflow.dataset.plan import Part, Plan, count_parts, joined, read_plan, write_part
from degflow.dataset.scales import scales_of
from degflow.degrader import Degrader
from degflow.storage import Place, Source
from degflow.synthesis.codec import Codec, Loaded
from degflow.synthesis.inventory import Input
from degflow.synthesis.pool import pool_of
from degflow.synthesis.resuming import Recipe, continued
from degflow.synthesis.settings import SynthesizeConfig, resolve
from degflow.synthesis.shard import ShardMaker
from degflow.synthesis.window import WindowDegrader

_SAMPLES = 8  # files that an estimate reads


def synthesize(config: SynthesizeConfig) -> None:
    """Make the dataset, or what is missing of it.

    Raises:
        ValueError: a broken rule, no images, an output that holds something else, or too many rejects.
        OSError: storage that cannot be read or written.
    """
    run = Run(config, Degrader.load(config.model or None))
    run.plan()
    if run.is_finished():
        print(f"{config.output}: finished already, nothing to do (overwrite=true makes it again)")
    elif config.dry_run:
        print(f"{run.describe()}\n{run.estimate()}")
        return
    else:
        run.claim()
        print(run.describe(), flush=True)
        run.make()
        while not run.finish():  # another driver has extended the plan
            run.make()
        print(run.summary())
    if run.output.exists(PREVIEW):
        print(f"preview: {run.output.uri_of(PREVIEW)}")


class Run:
    """A run: what it reads, what it makes, and how far it is.

    Args:
        config: as the user gave it; it is resolved here, and compared with the configuration in the output.
        degrader: on the CPU.

    Raises:
        ValueError: a configuration that the model or the output does not allow.
        OSError: the output cannot be read.
    """

    def __init__(self, config: SynthesizeConfig, degrader: Degrader):
        self.degrader, self.output = degrader, Place(config.output)
        self.config = config = continued(resolve(config, degrader), self.output)
        self.input = Input(config.input, config.root, without=self.output, limit=config.limit)
        self.recipe = Recipe(config)
        self.codec = Codec(
            root=self.input.root.uri,
            max_pixels=config.max_pixels,
            embed=config.hr == "embed",
            scaled=config.size == "scaled",
            seed=config.seed,
            model_sha256=config.model_sha256,
        )
        self.shards = Plan.empty()
        self.done: dict[int, Record] = {}
        self.next: Part | None = None  # what `claim` adds to the plan
        self.made = 0  # photographs, by this process
        self.started = time.monotonic()

    def plan(self) -> None:
        """Read what the output holds, and choose the photographs that the plan gets next. Nothing is written."""
        if not self.config.overwrite:
            self._read()
        self.next = self._next_part()

    def _read(self) -> None:
        self.shards = read_plan(self.output)
        self.done = finished_shards(self.output, self.shards, self.recipe.digest)

    def _next_part(self) -> Part | None:
        """All of the input for an empty plan; later the new files and the rejected ones, if they are asked for."""
        config, size, part = self.config, self.config.shard.images, None
        if not len(self.shards):
            return self.shards.next_part(self.input.images(), size)
        if config.extend:
            part = self.shards.next_part(self.input.new_images(self.shards), size)
        elif (config.dry_run or self.output.exists(SUCCESS)) and (new := self.input.new_images(self.shards)):
            first = ", ".join(new["key"].slice(0, 3).to_pylist()) + (", ..." if len(new) > 3 else "")
            print(f"{len(new)} new in {config.input} since the plan was made ({first}); extend=true takes them")
        if config.retry_rejects:
            plan = self.shards.plus(part) if part else self.shards
            keys = [reject.key for reject in rejects_of(self.output, plan, self.done)]
            part = joined(part, plan.next_part(self.input.as_now(plan.sources(keys)), size))
        return part or None

    def is_finished(self) -> bool:
        """Whether the output is a whole dataset, and nothing more is asked for."""
        if self.config.overwrite or self.next or not self.output.exists(SUCCESS):
            return False
        return len(self.done) == len(self.shards) == parts_in_manifest(self.output)

    def claim(self) -> None:
        """Write the configuration, then what the plan gets next. If another driver wrote a plan first, it counts."""
        try:
            if self.config.overwrite:
                for name in find_objects(self.output):
                    if name != CONFIG:
                        self.output.delete(name)
                self._save_config()
            elif not self._save_config(new=True):
                continued(self.config, self.output)
            if self.next:
                self.output.delete(SUCCESS)
                if not write_part(self.output, self.shards.parts, self.next):
                    print("another driver planned at the same time: its plan counts", flush=True)
                self.shards, self.next = read_plan(self.output), None
                if not len(self.shards):
                    raise OSError("another driver is overwriting it")
        except OSError as error:
            raise OSError(f"output={self.output.uri}: cannot be written ({type(error).__name__}: {error})") from error
        self.started = time.monotonic()

    def _save_config(self, new: bool = False) -> bool:
        orders = {"overwrite": False, "dry_run": False, "extend": False, "retry_rejects": False}
        return self.output.write(CONFIG, dump(replace(self.config, **orders)).encode(), new=new)

    def pending(self) -> list[int]:
        """The planned shards that are not done."""
        return [number for number in range(len(self.shards)) if number not in self.done]

    def make(self) -> None:
        """Make the pending shards on a pool of actors.

        Raises:
            ValueError: some are missing still.
        """
        pending = self.pending()
        if not pending:
            return
        with pool_of(self.config.actors) as pool:
            if pool.threads != self.config.actors.threads:
                self.config = replace(self.config, actors=replace(self.config.actors, threads=pool.threads))
                self._save_config()
            pool.make(self.maker(), self.shards, pending, self.config.price.per_hour)
        self.made += self.shards.images(pending)
        self.done = finished_shards(self.output, self.shards, self.recipe.digest)
        if missing := self.pending():
            same = "the same command without overwrite=true" if self.config.overwrite else "the same command"
            raise ValueError(f"{len(missing)} of {len(self.shards)} shards are missing; {same} makes them")

    def maker(self) -> ShardMaker:
        """What makes this run's shards, wherever it is sent."""
        config = self.config
        degrader = WindowDegrader(
            self.degrader,
            memory=config.memory,
            precision=config.precision,
            steps=config.solver.steps,
            solver=config.solver.solver,
            seed=config.seed,
            spread=config.spread,
        )
        scales = partial(scales_of, config.scale, config.seed)
        return ShardMaker(config.output, self.recipe, self.codec, scales, degrader, config.batch)

    def finish(self) -> bool:
        """Make a dataset of the shards: manifest, card and preview, and last `_SUCCESS`.

        Returns:
            False, without `_SUCCESS`, if another driver has extended the plan; the run then has new pending shards.

        Raises:
            ValueError: too many rejects.
        """
        if self._is_extended():
            return False
        write_manifest(self.output, self.shards, self.done)
        text = card(self.done, self.rejects, plain(self.config), self.config.scale.in_words())
        self.output.write(CARD, text.encode())
        try:
            if sheet := preview(self.output, self.done, self.config.max_pixels):
                self.output.write(PREVIEW, sheet)
        except Exception as error:  # a missing preview must not fail a finished dataset
            print(f"no preview: {type(error).__name__}: {error}")
        for name in filter(is_leftover, find_objects(self.output)):
            self.output.delete(name)
        if self.rejects > self.config.max_reject_rate * self.shards.files:
            raise ValueError(
                f"{self.rejects} of {self.shards.files} files were rejected, more than "
                f"max_reject_rate={self.config.max_reject_rate}: {self._first_rejects()}"
            )
        if self._is_extended():
            return False
        self.output.write(SUCCESS, b"")
        return True

    def _is_extended(self) -> bool:
        """Whether another driver has extended the plan; then it is read again."""
        if count_parts(self.output) == self.shards.parts:
            return False
        self._read()
        return True

    @property
    def used(self) -> int:
        """Photographs with rows: a photograph has the rows of all its draws, or is one reject."""
        return sum(record.rows for record in self.done.values()) // self.config.scale.per_image

    @property
    def rejects(self) -> int:
        """Photographs without rows, however often they were tried."""
        return self.shards.files - self.used

    def _first_rejects(self, count: int = 3) -> str:
        first = islice(rejects_of(self.output, self.shards, self.done), count)
        return "; ".join(f"{r.key} ({r.stage}: {r.error})" for r in first) + "; the rejects folder has all"

    def describe(self) -> str:
        """The plan in one line."""
        plan = self.shards.plus(self.next) if self.next else self.shards
        done = f", {len(self.done)} of them done" if self.done else ""
        return (
            f"{plan.files} images ({plan.bytes / 1e6:.1f} MB) in {len(plan)} shards{done}; "
            f"{self.config.scale.per_image} LR each, scales {self.config.scale.in_words()}"
        )

    def estimate(self) -> str:
        """How much there is to make, judged from a few files, and the memory that planning took."""
        plan = self.shards.plus(self.next) if self.next else self.shards
        sources: list[Source] = plan.sample(_SAMPLES)
        with ThreadPoolExecutor(_SAMPLES) as pool:
            loaded = list(pool.map(self.codec.load, sources))
        sizes = [item.pixels.shape[0] * item.pixels.shape[1] for item in loaded if isinstance(item, Loaded)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        planned = f"planned with {peak:.0f} MB of memory at most; dry_run=true: nothing was started or written"
        planned = "\n".join([*self._time_left(plan), planned])
        if not sizes:
            return f"none of {len(sources)} sampled files is a readable image, so there is no estimate\n{planned}"
        mean = sum(sizes) / len(sizes)
        total = mean * plan.files * self.config.scale.per_image * len(sizes) / len(sources)
        return (
            f"some {total / 1e6:,.0f} megapixels of LR to make: of {len(sources)} sampled files {len(sizes)} are "
            f"readable, with {mean / 1e6:.2f} megapixels on average\n{planned}"
        )

    def _time_left(self, plan: Plan) -> list[str]:
        """A line on the time and price of what is left, by the shards that are done; none before the first one."""
        done, price = plan.images(self.done), self.config.price.per_hour
        if not done:
            return []
        left = plan.images(number for number in range(len(plan)) if number not in self.done)
        hours = sum(record.seconds for record in self.done.values()) / done * left / 3600
        cost = f", which cost {price * hours:.2f}" if price else ""
        return [f"{left} images are left; by the shards that are done they take {hours:.2f} hours of one actor{cost}"]

    def summary(self) -> str:
        """What the dataset holds, and how fast this process was."""
        rows = sum(record.rows for record in self.done.values())
        lines = [f"{rows} LR images of {self.used} photographs in {len(self.done)} shards, {self.rejects} rejects"]
        if self.rejects:
            lines.append(f"rejected: {self._first_rejects()}")
        if self.made:
            seconds = time.monotonic() - self.started
            lines.append(f"{self.made} images in {seconds:.1f} s with Ray's start: {self.made / seconds:.2f} images/s")
        return "\n".join([*lines, f"dataset: {self.output.uri}"])
