"""Model families of Hugging Face to import and export: one small file each, which maps names and shapes."""

from dispatch.errors import InvalidValue
from workers.families import deepseek_v3, mixtral, olmoe, qwen3_moe
from workers.families.base import Family, Part
from workers.families.settings import Settings

__all__ = ["FAMILIES", "Family", "Part", "Settings", "family_of"]

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (deepseek_v3, mixtral, olmoe, qwen3_moe)}


def family_of(settings: Settings) -> Family:
    """The family of a config.json. Raises ValueError, with those that are supported, for any other."""
    model_type, architectures = settings.values.get("model_type"), settings.values.get("architectures") or []
    family: Family | None = FAMILIES.get(str(model_type))
    if (
        family is None
        or not isinstance(architectures, list)
        or (architectures and family.architecture not in architectures)
    ):
        known = ", ".join(f"{each.model_type} ({each.architecture})" for each in FAMILIES.values())
        raise InvalidValue(
            f"{settings.where}: model_type {model_type!r} with architectures {architectures} is not supported; "
            f"supported are {known}; docs/models.md shows how to add a family"
        )
    return family
