"""One run of the job, from its configuration to `_SUCCESS`."""

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from degflow import images, storage
from degflow.config import Unfinished, dump, plain
from degflow.dataset.card import card, preview, samples
from degflow.dataset.croissant import croissant
from degflow.dataset.gallery import gallery
from degflow.dataset.layout import (
    CARD,
    CONFIG,
    CROISSANT,
    GALLERY,
    PREVIEW,
    SUCCESS,
    find_objects,
    is_doomed_first,
    is_leftover,
)
from degflow.dataset.manifest import first_rejects, parts_in_manifest, rejects_of, write_manifest, write_rejects
from degflow.dataset.plan import Part, Plan, joined, write_part
from degflow.dataset.recipe import Recipe
from degflow.dataset.scales import scales_of
from degflow.degrader import MEMORY, Degrader
from degflow.storage import Place, Source
from degflow.synthesis.codec import Codec, Loaded
from degflow.synthesis.inventory import Input
from degflow.synthesis.pool import pool_of
from degflow.synthesis.resuming import continued
from degflow.synthesis.settings import SynthesizeConfig, resolve
from degflow.synthesis.shard import FIRST_PATIENCE, ShardMaker
from degflow.synthesis.sizes import bytes_per_pixel, next_part
from degflow.synthesis.state import State
from degflow.synthesis.window import WindowDegrader

_SAMPLES = 8  # files that an estimate reads
_HEAD = 1 << 20  # bytes of a file that hold its image's size


def synthesize(config: SynthesizeConfig) -> None:
    """Make the dataset, or what is missing of it.

    Raises:
        ValueError: a broken rule, no images, an output that holds something else, or too many rejects.
        Unfinished: shards are missing, which the same command makes.
        OSError: storage that cannot be read or written.
    """
    run = Run(config, Degrader.load(config.model))
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
        while not run.finish():
            run.make()
        print(run.summary())
    if run.output.exists(GALLERY):
        print(f"preview: {run.output.uri_of(GALLERY)}")


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
        self.recipe = Recipe(plain(config))
        self.codec = Codec(
            root=self.input.root.everywhere,
            max_pixels=config.max_pixels,
            embed=config.hr == "embed",
            codec=config.codec,
            scaled=config.size == "scaled",
            keep_gray=config.gray == "keep",
            seed=config.seed,
            model_sha256=config.model_sha256,
            patience=storage.PATIENCE,
        )
        self.state = State(self.output, self.recipe)
        self.next: Part | None = None  # what `claim` adds to the plan
        self.made = 0  # photographs, by this process
        self.started = time.monotonic()

    def plan(self) -> None:
        """Read what the output holds, and choose the photographs that the plan gets next. Nothing is written.

        Raises:
            ValueError: the output has `_SUCCESS`, and parts that are not of its run.
        """
        if not self.config.overwrite:
            self.state.read()
            self.state.refuse_foreign()
        self.next = self._next_part()

    def _next_part(self) -> Part | None:
        """All of the input for an empty plan; later the new files and the rejected ones, if they are asked for."""
        config, part = self.config, None
        if not len(self.state.plan):
            return next_part(self.state.plan, self.input.images(), config)
        if config.extend:
            part = next_part(self.state.plan, self.input.new_images(self.state.plan), config)
        elif (config.dry_run or self.output.exists(SUCCESS)) and (new := self.input.new_images(self.state.plan)):
            first = ", ".join(new["key"].slice(0, 3).to_pylist()) + (", ..." if len(new) > 3 else "")
            print(f"{len(new)} new in {config.input} since the plan was made ({first}); extend=true takes them")
        if config.retry_rejects:
            plan = self.state.plan.plus(part) if part else self.state.plan
            keys = [reject.key for reject in rejects_of(self.output, self.state.done, plan.newest())]
            part = joined(part, next_part(plan, self.input.as_now(plan.sources(keys)), config))
        return part or None

    def is_finished(self) -> bool:
        """Whether the output is a whole dataset, and nothing more is asked for."""
        if self.config.overwrite or self.next or not self.output.exists(SUCCESS):
            return False
        return len(self.state.done) == len(self.state.plan) == parts_in_manifest(self.output)

    def claim(self) -> None:
        """Write the configuration, then what the plan gets next; delete what is not of this run.

        If another driver wrote a plan first, it counts.
        """
        try:
            if self.config.overwrite:
                self._clear()
            elif not self._save_config(new=True):
                continued(self.config, self.output)
            if not self.output.keeps_first(CONFIG):
                print("the output's store knows no If-None-Match: start no other run on it", flush=True)
            if self.next:
                self.output.delete(SUCCESS)
                if not write_part(self.output, self.state.plan.parts, self.next):
                    print("another driver planned at the same time: its plan counts", flush=True)
                self.next = None
            self.state.read()
            if not len(self.state.plan):
                raise OSError("another driver is overwriting it")
            self.state.sweep()
            if self.state.pending():
                self.output.delete(SUCCESS)
        except OSError as error:
            raise OSError(f"output={self.output.uri}: cannot be written ({type(error).__name__}: {error})") from error
        self.started = time.monotonic()

    def _clear(self) -> None:
        """Delete the dataset; see `layout` for the order."""
        for name in filter(is_doomed_first, find_objects(self.output)):
            self.output.delete(name)
        self._save_config()
        # Listed again: a late writer may have put a part.
        self.output.delete_all([name for name in find_objects(self.output) if name != CONFIG])

    def _save_config(self, new: bool = False) -> bool:
        orders = {"overwrite": False, "dry_run": False, "extend": False, "retry_rejects": False}
        return self.output.write(CONFIG, dump(replace(self.config, **orders)).encode(), new=new)

    def make(self) -> None:
        """Make the pending shards on a pool of actors. If the run ends early, `rejects/` says why files were rejected.

        Raises:
            ValueError: most of the first images were rejected.
            Unfinished: some are missing still.
        """
        pending = self.state.pending()
        if not pending:
            return
        with pool_of(self.config.actors) as pool:
            if pool.threads != self.config.actors.threads:
                self.config = replace(self.config, actors=replace(self.config.actors, threads=pool.threads))
                self._save_config()
            self._say_if_too_large(pending, self.config.memory or (0 if pool.gpus else MEMORY))
            try:
                pool.make(self.maker(), self.state.plan, pending, self.config.price.per_hour)
            except (ValueError, Unfinished):  # it may point to the rejects
                self.state.read()
                write_rejects(self.output, self.state.plan, self.state.done)
                raise
        self.made += self.state.plan.images(pending)
        self.state.read()
        if missing := [number for number in pending if number not in self.state.done]:
            same = "the same command without overwrite=true" if self.config.overwrite else "the same command"
            raise Unfinished(f"{len(missing)} of {len(self.state.plan)} shards are missing; {same} makes them")

    def _say_if_too_large(self, pending: list[int], memory: float) -> None:
        """Say if the largest file, probably the largest image, does not fit. Memory 0: that of GPUs, unknown here."""
        if not memory or not (largest := self.state.plan.largest(pending)):
            return
        try:
            head = Place(self.input.root.uri, patience=FIRST_PATIENCE).read(largest.key, 0, min(largest.size, _HEAD))
        except OSError:  # if it stays away, it will be a reject
            return
        height, width = images.size_of(head, max_pixels=self.config.max_pixels)
        try:
            if height and width:
                self.degrader.plan(height, width, memory)
        except ValueError as error:
            print(f"{largest.key} and images as large will be rejects: {error}", flush=True)

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
        return ShardMaker(self.output.everywhere, self.recipe, self.codec, scales, degrader, config.batch)

    def finish(self) -> bool:
        """Make a dataset of the shards: manifest, card and preview, and last `_SUCCESS`.

        Returns:
            False, without `_SUCCESS`, if shards are pending, e.g. because another driver has extended the plan.

        Raises:
            ValueError: too many rejects.
        """
        self.state.read()
        self.state.sweep()
        if self.state.pending():
            return False
        write_rejects(self.output, self.state.plan, self.state.done)
        write_manifest(self.output, self.state.plan, self.state.done)
        recipe = plain(self.config)
        told = self.rejects, recipe, self.config.scale.in_words()
        self.output.write(CARD, card(self.state.done, *told, self.degrader.draws).encode())
        self.output.write(CROISSANT, croissant(sum(done.rows for done in self.state.done.values()), recipe).encode())
        try:
            shown = samples(self.output, self.state.done, recipe)
            if sheet := preview(shown):
                self.output.write(PREVIEW, sheet)
                self.output.write(GALLERY, gallery(self.output, shown, self.state.done, *told).encode())
        except Exception as error:  # a missing preview must not fail a finished dataset
            print(f"no preview: {type(error).__name__}: {error}")
        for name in filter(is_leftover, find_objects(self.output)):
            self.output.delete(name)
        if self.rejects > self.config.max_reject_rate * self.state.plan.files:
            raise ValueError(
                f"{self.rejects} of {self.state.plan.files} files were rejected, more than "
                f"max_reject_rate={self.config.max_reject_rate}: {self._first_rejects()}"
            )
        if self.state.is_extended():
            return False
        self.output.write(SUCCESS, b"")
        return True

    @property
    def used(self) -> int:
        """Photographs with rows: a photograph has the rows of all its draws, or is one reject."""
        return sum(record.rows for record in self.state.done.values()) // self.config.scale.per_image

    @property
    def rejects(self) -> int:
        """Photographs without rows, however often they were tried."""
        return self.state.plan.files - self.used

    def _first_rejects(self, count: int = 3) -> str:
        first = first_rejects(self.output, count)
        return "; ".join(f"{r.key} ({r.stage}: {r.error})" for r in first) + "; the rejects folder has all"

    def describe(self) -> str:
        """The plan in one line; a second one if the dataset's rows will name files of this machine."""
        plan = self.state.plan.plus(self.next) if self.next else self.state.plan
        done = f", {len(self.state.done)} of them done" if self.state.done else ""
        line = (
            f"{plan.files} images ({plan.bytes / 1e6:.1f} MB) in {len(plan)} shards{done}; "
            f"{self.config.scale.per_image} LR each, scales {self.config.scale.in_words()}"
        )
        if self.codec.embed or not self.input.root.local:
            return line
        return (
            f"{line}\nNOTE: hr=reference and a local input: rows name HR as files in {self.input.root.root}, "
            "so the dataset CANNOT TRAVEL to another machine; hr=embed, the default, holds HR in the dataset"
        )

    def estimate(self) -> str:
        """How much there is to make, judged from a few files, and the memory that planning took."""
        plan = self.state.plan.plus(self.next) if self.next else self.state.plan
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
        total = mean * plan.files * len(sizes) / len(sources)
        return (
            f"some {total * self.config.scale.per_image / 1e6:,.0f} megapixels of LR to make, a dataset of some "
            f"{total * bytes_per_pixel(self.config) / 1e9:,.1f} GB: of {len(sources)} sampled files {len(sizes)} are "
            f"readable, with {mean / 1e6:.2f} megapixels on average\n{planned}"
        )

    def _time_left(self, plan: Plan) -> list[str]:
        """A line on the time and price of what is left, by the shards that are done; none before the first one."""
        finished, price = self.state.done, self.config.price.per_hour
        done = plan.images(finished)
        if not done:
            return []
        left = plan.images(number for number in range(len(plan)) if number not in finished)
        hours = sum(record.seconds for record in finished.values()) / done * left / 3600
        cost = f", which cost {price * hours:.2f}" if price else ""
        return [f"{left} images are left; by the shards that are done they take {hours:.2f} hours of one actor{cost}"]

    def summary(self) -> str:
        """What the dataset holds, and how fast this process was."""
        done = self.state.done
        rows = sum(record.rows for record in done.values())
        lines = [f"{rows} LR images of {self.used} photographs in {len(done)} shards, {self.rejects} rejects"]
        if self.rejects:
            lines.append(f"rejected: {self._first_rejects()}")
        if self.made:
            seconds = time.monotonic() - self.started
            lines.append(f"{self.made} images in {seconds:.1f} s with Ray's start: {self.made / seconds:.2f} images/s")
        return "\n".join([*lines, f"dataset: {self.output.uri}"])
