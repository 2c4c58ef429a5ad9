"""Whether a run may continue what its output holds: the stored configuration must make the same rows as the new one."""

from dataclasses import replace

from degflow.config import parse, plain, read
from degflow.dataset.layout import CONFIG, is_leftover
from degflow.dataset.recipe import Recipe, flat
from degflow.storage import Place
from degflow.synthesis.settings import SynthesizeConfig


def continued(config: SynthesizeConfig, output: Place) -> SynthesizeConfig:
    """Check a resolved configuration against the run in `output`, and take over that run's number of threads.

    With `overwrite` the configurations may differ.

    Raises:
        ValueError: the output holds something else, or a run with another configuration.
        OSError: the output cannot be read.
    """
    stored = _stored(output)
    if stored is None or config.overwrite:
        return config
    _check_version(config, output)
    if changes := Recipe(plain(config)).changes(Recipe(plain(stored))):
        raise ValueError(
            f"output={output.uri}: holds a run with another configuration ({'; '.join(changes)}); "
            "choose another output, or overwrite=true"
        )
    threads = config.actors.threads or stored.actors.threads
    return replace(config, actors=replace(config.actors, threads=threads))


def _check_version(config: SynthesizeConfig, output: Place) -> None:
    """Raise ValueError if the stored configuration lacks keys: its shards' digests are of another version's recipe."""
    there = {name for name, _ in flat(read(output.read(CONFIG).decode()))}
    if missing := sorted(Recipe(plain(config)).values.keys() - there):
        raise ValueError(
            f"output={output.uri}: its {CONFIG} has no {missing[0]}, so another version of degflow has begun it; "
            "finish it with that version, or choose another output, or overwrite=true"
        )


def _stored(output: Place) -> SynthesizeConfig | None:
    """The configuration of the run in the output; None if the output is empty."""
    foreign = f"output={output.uri}: is not empty and holds no dataset of this job; choose another"
    try:
        return parse(SynthesizeConfig, read(output.read(CONFIG).decode()))
    except FileNotFoundError:
        names = _names_in(output)
        if CONFIG in names:  # another driver has just written it
            return _stored(output)
        if names:
            raise ValueError(foreign) from None
        return None
    except NotADirectoryError:
        raise ValueError(f"output={output.uri}: is a file, or lies in one") from None
    except OSError as error:
        raise OSError(f"output={output.uri}: cannot be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # the YAML reader raises many kinds for a foreign config.yaml
        raise ValueError(f"{foreign} (its config.yaml: {error})") from None


def _names_in(output: Place) -> list[str]:
    try:
        return [file.key for file in output.files() if not is_leftover(file.key)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"output={output.uri}: cannot be written ({error})") from error
