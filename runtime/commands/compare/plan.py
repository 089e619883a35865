"""The plan of a comparison: its methods, seeds and settings, and the folder of each of its runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from dispatch.errors import InvalidValue
from runtime.commands.compare.methods import Method, parse_methods, with_values
from runtime.settings.config import TrainConfig, cross_check, flatten
from runtime.settings.config_file import config_from_yaml, config_to_yaml
from runtime.settings.yaml_text import load_yaml, read_bounded
from workers.checkpoints.checkpoint_files import CHECKPOINTS, latest
from workers.record.atomic_file import write_atomically
from workers.record.run_log import EVENTS, read_events

PLAN_FILE = "compare.yaml"


@dataclass(frozen=True)
class RunKey:
    """One run of a comparison."""

    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.method.spec} seed {self.seed}"


@dataclass(frozen=True)
class ComparePlan:
    """A comparison as `compare.yaml` holds it. base: settings that all runs share; seeds count from its run.seed."""

    out: Path
    methods: tuple[Method, ...]
    num_seeds: int
    base: TrainConfig

    @classmethod
    def read(cls, out: Path) -> Self:
        """The comparison in a folder. Raises InvalidValue where there is none, or the file is damaged."""
        path = out / PLAN_FILE
        try:
            values = load_yaml(read_bounded(path))
            laws, num_seeds, settings = values["laws"], int(values["seeds"]), values["settings"]
        except OSError as error:
            raise InvalidValue(
                f"there is no comparison in {out}: {path} cannot be read ({error.strerror}); give its folder by --out"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValue(f"{path} is damaged: {error}") from error
        return cls(out, parse_methods(laws), num_seeds, config_from_yaml(yaml.safe_dump(settings)))

    def write(self) -> None:
        """Write compare.yaml, at once or not at all."""
        self.out.mkdir(parents=True, exist_ok=True)
        values = {
            "laws": [method.spec for method in self.methods],
            "seeds": self.num_seeds,
            "settings": load_yaml(config_to_yaml(self.base)),
        }
        write_atomically(self.out / PLAN_FILE, yaml.safe_dump(values, sort_keys=False))

    @property
    def runs(self) -> Iterator[RunKey]:
        """List all runs seed by seed, so that an unfinished comparison has the same seeds of all methods."""
        for seed in range(self.base.run.seed, self.base.run.seed + self.num_seeds):
            for method in self.methods:
                yield RunKey(method, seed)

    def run_dir(self, key: RunKey) -> Path:
        """The run directory of a run."""
        return self.out / key.method.slug / f"seed_{key.seed}"

    def log_file(self, key: RunKey) -> Path:
        """What the process of this run wrote to its terminal."""
        return self.run_dir(key).with_suffix(".log")

    def config_of(self, key: RunKey) -> TrainConfig:
        """The settings of a run. Raises InvalidValue where the method does not fit them."""
        run_dir = self.run_dir(key).absolute()
        values = {"run.dir": str(run_dir.parent), "run.name": run_dir.name, "run.seed": key.seed}
        config: TrainConfig = with_values(self.base, {**values, **key.method.values})
        cross_check(config)
        return config

    def is_finished(self, key: RunKey) -> bool:
        """Whether the run has made its last step and saved."""
        events = read_events(self.run_dir(key)) if (self.run_dir(key) / EVENTS).exists() else []
        return any(event["event"] == "finished" for event in events)

    def newest_checkpoint(self, key: RunKey) -> Path | None:
        """Where an unfinished run goes on; None where it begins again."""
        return latest(self.run_dir(key) / CHECKPOINTS)


def grown(saved: ComparePlan, wanted: ComparePlan) -> ComparePlan:
    """The saved comparison with the methods and seeds of another one added.

    Raises:
        InvalidValue: a setting differs, or there would be fewer seeds.
    """
    before, after = flatten(saved.base), flatten(wanted.base)
    changed = [f"{key} (was {before[key]!r}, now {after[key]!r})" for key in before if before[key] != after[key]]
    if changed:
        raise InvalidValue(
            f"a resumed comparison must keep {', '.join(changed)}; leave it as it was, or start a new one with "
            "another --out"
        )
    if wanted.num_seeds < saved.num_seeds:
        raise InvalidValue(
            f"--seeds {wanted.num_seeds}: the comparison in {saved.out} has {saved.num_seeds}, give no fewer"
        )
    added = [method for method in wanted.methods if method not in saved.methods]
    return ComparePlan(saved.out, (*saved.methods, *added), wanted.num_seeds, saved.base)
