"""For a model that is not supported: finds the nearest family, and which settings that family does not know."""

from collections.abc import Iterable, Mapping
from typing import Any

from dispatch.errors import InvalidValue
from workers.model.families.base import Family
from workers.model.families.settings import Settings

# Settings in config.json about files, training or use, which do not change the model.
_OF_NO_WEIGHT = {
    *("architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "dtype", "ep_size", "initializer_range"),
    *("model_type", "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "seq_aux", "torch_dtype"),
    *("transformers_version", "use_cache"),
}


class _Noting(dict[str, Any]):
    """Values that note the names they are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def describe_nearest(settings: Settings, families: Iterable[Family]) -> str:
    """Describe the family that reads this config.json with the fewest names left unread.

    If all families refuse it, it is the one that read most names before.
    """
    *_, text = min(_reading(settings.values, family) for family in families)
    return f"the nearest is {text}"


def _reading(values: Mapping[str, Any], family: Family) -> tuple[bool, int, str]:
    """Whether a family refuses the values, how many names it did not ask for, and both in words."""
    noting = _Noting(values)
    try:
        family.read_config(Settings(noting, "its config.json"))
    except InvalidValue as error:
        return True, len(values.keys() - noting.asked), f"{family.model_type}, which refuses it too: {error}"
    unread = sorted(name for name in values.keys() - noting.asked - _OF_NO_WEIGHT if not name.endswith("_token_id"))
    return False, len(unread), f"{family.model_type}, which does not know {', '.join(unread) or 'the name alone'}"
