"""Model families of Hugging Face, each one small file that maps names and shapes to those of our decoder.

Begin with `mixtral`, the smallest, and `base.Family`, which says what a family declares; docs/models.md shows how to
add one. `settings` reads config.json strictly, `shapes` reads the settings that most families have, `nearest` names the
nearest family in the error for a model of none, `stacks` names the experts in a tensor that holds all of a layer.
`workers.model.hugging_face` reads and writes the files.
"""

from importlib import import_module

from dispatch.errors import InvalidValue
from workers.model.families.base import Family, Part
from workers.model.families.nearest import describe_nearest
from workers.model.families.settings import Settings

__all__ = ["FAMILIES", "Family", "Part", "Settings", "family_of"]

# The files of this folder that declare a FAMILY: a new family is one more name here.
_NAMES = (
    "afmoe",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "hy_v3",
    "kimi_k2",
    "kimi_k25",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "solar_open",
)
_ALL: list[Family] = [import_module(f"{__name__}.{name}").FAMILY for name in _NAMES]
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(settings: Settings) -> Family:
    """The family of a config.json.

    Raises:
        InvalidValue: no family supports it; the error names the nearest family, and what differs.
    """
    model_type, architectures = settings.values.get("model_type"), settings.values.get("architectures") or []
    family: Family | None = FAMILIES.get(str(model_type))
    if (
        family is None
        or not isinstance(architectures, list)
        or (architectures and not {family.architecture, *family.other_architectures} & set(map(str, architectures)))
    ):
        raise InvalidValue(
            f"{settings.where}: model_type {model_type!r:.60} with architectures {architectures!r:.60} is not "
            f"supported; supported are {', '.join(FAMILIES)}; {describe_nearest(settings, FAMILIES.values())}; "
            "docs/models.md shows how to add a family"
        )
    return family
