"""What the output holds of a run: its plan, the shards that are done, and parts that are not of this run.

`dataset.layout` says why a part may be deleted here, and when.
"""

import contextlib

from degflow.dataset.layout import SUCCESS, Record
from degflow.dataset.manifest import data_files, judge
from degflow.dataset.plan import Plan, plan_files, read_plan
from degflow.dataset.recipe import Recipe
from degflow.storage import Place, Source


class State:
    """The state of an output, as it was read last; at first nothing is planned.

    Args:
        output: the dataset.
        recipe: of the run.
    """

    def __init__(self, output: Place, recipe: Recipe):
        self.output, self.recipe = output, recipe
        self.plan = Plan.empty()
        self.done: dict[int, Record] = {}
        self.foreign: list[Source] = []  # data parts of another recipe or number, and damaged ones
        self._planned: list[Source] = []  # the objects that `plan` was read from

    def read(self) -> None:
        """Read what is planned and done now.

        Raises:
            OSError: another run has overwritten the output.
        """
        files = data_files(self.output)  # before the plan; see `layout`
        if self.is_extended():
            self._planned = plan_files(self.output)
            self.plan = read_plan(self.output, self._planned)
        self.done, self.foreign = judge(self.output, files, self.plan, self.recipe.digest, self.done)

    def is_extended(self) -> bool:
        """Whether the plan has new parts since it was read.

        Raises:
            OSError: another run has overwritten the output.
        """
        now, ours = plan_files(self.output), True
        with contextlib.suppress(FileNotFoundError):  # of an output that is not claimed yet
            ours = self.recipe.is_stored_in(self.output)
        if now[: len(self._planned)] != self._planned or not ours:
            raise OSError(f"output={self.output.uri}: another run has overwritten it (overwrite=true)")
        return len(now) > len(self._planned)

    def pending(self) -> list[int]:
        """The planned shards that are not done."""
        return [number for number in range(len(self.plan)) if number not in self.done]

    def refuse_foreign(self) -> None:
        """Raise a ValueError if the output is finished and has foreign parts."""
        if self.foreign and self.output.exists(SUCCESS):
            names = ", ".join(file.key for file in self.foreign[:3]) + (", ..." if len(self.foreign) > 3 else "")
            raise ValueError(
                f"output={self.output.uri}: is finished, but these are damaged, or no parts of its run: {names}; "
                f"if no other run writes into it, delete {SUCCESS}, and the same command replaces them"
            )

    def sweep(self) -> None:
        """Delete the foreign parts, and print their names.

        Raises:
            ValueError: the output is finished.
        """
        for name in [file.key for file in self.foreign]:
            try:  # another driver may have replaced it
                now = judge(self.output, [self.output.source(name)], self.plan, self.recipe.digest)
            except FileNotFoundError:
                continue
            self.done |= now.done
            if now.foreign:
                self.refuse_foreign()
                self.output.delete(name)
                print(f"{name}: damaged, or no part of this run: deleted", flush=True)
        self.foreign = []
