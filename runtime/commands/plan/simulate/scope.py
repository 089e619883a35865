"""Settings that the simulation cannot time: those that matter much are refused, others are named in a note."""

from dispatch.config import ScheduleConfig
from dispatch.errors import InvalidValue
from runtime.settings.config import TrainConfig


def check_scope(config: TrainConfig) -> None:
    """Refuse settings on which the time of a step depends and that the simulation cannot time.

    Raises:
        InvalidValue: names the setting, why, and the way out.
    """
    parallel = config.parallel
    unknown = {
        f"parallel.context ({parallel.context})": (parallel.context > 1, "gathers of keys", "--context 1"),
        f"parallel.pipeline.size ({parallel.pipeline.size})": (
            parallel.pipeline.size > 1,
            "stages of layers",
            "--pp 1 with the ranks of one stage as --world, --bubble for the share that stages wait",
        ),
        f"parallel.expert_copies ({parallel.expert_copies})": (
            parallel.expert_copies > 0,
            "how copies even the load out",
            "parallel.expert_copies 0",
        ),
    }
    for setting, (is_set, what, way_out) in unknown.items():
        if is_set:
            raise InvalidValue(
                f"--simulate does not know {setting}: {what} are not timed; simulate with {way_out}, or plan without "
                "--simulate"
            )


def left_out(config: TrainConfig) -> tuple[str, ...]:
    """A sentence for each setting whose effect the times leave out."""
    model = config.model
    notes = {
        "optim.offload: copies of the optimizer's state from and to the host are not timed": (
            config.optim.offload != "none"
        ),
        f"optim.name {config.optim.name}: its update is timed as that of adamw": config.optim.name != "adamw",
        "model.sliding_window: attention is timed as without it": model.sliding_window > 0,
        "data: attention is timed as in rows of one document": config.data.has_documents,
        "model.lora: gradients of the weights that are not trained are timed too": model.lora.rank > 0,
        "parallel.schedule: its chunks and overlap are not timed; --overlap says how much hides": (
            config.parallel.schedule != ScheduleConfig()
        ),
    }
    return tuple(note for note, applies in notes.items() if applies)
