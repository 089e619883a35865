"""For a model that is not supported: finds the nearest family, and the settings that this family does not know."""

from collections.abc import Iterable, Mapping
from typing import Any

from dispatch.errors import InvalidValue
from workers.model.families.base import Family
from workers.model.families.settings import Settings

# Settings in config.json about files, training or use, which do not change the model.
_IRRELEVANT = {
    *("architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "dtype", "ep_size", "initializer_range"),
    *("model_type", "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "seq_aux", "torch_dtype"),
    *("transformers_version", "use_cache"),
}


class _RecordingDict(dict[str, Any]):
    """A dict that records which names `get` was called with."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names_read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names_read.add(name)
        return super().get(name, default)


def describe_nearest(settings: Settings, families: Iterable[Family]) -> str:
    """Describe the family that accepts this config.json and leaves the fewest of its settings unread.

    If all families refuse it, the one that left the fewest unread until it refused.
    """
    *_, text = min(_try_family(settings.values, family) for family in families)
    return f"the nearest is {text}"


def _try_family(values: Mapping[str, Any], family: Family) -> tuple[bool, int, str]:
    """Whether a family refuses the values, how many names it did not read, and both in words."""
    recorded = _RecordingDict(values)
    try:
        family.read_config(Settings(recorded, "its config.json"))
    except InvalidValue as error:
        return True, len(values.keys() - recorded.names_read), f"{family.model_type}, which refuses it too: {error}"
    names = values.keys() - recorded.names_read - _IRRELEVANT
    unread = sorted(name for name in names if not name.endswith("_token_id"))
    return False, len(unread), f"{family.model_type}, which does not know {', '.join(unread) or 'the name alone'}"
