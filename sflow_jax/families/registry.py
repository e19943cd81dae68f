"""The families that there are; a new one is a line here."""

from sflow_jax.families.family import Family, Published
from sflow_jax.families.flux1 import FLUX1
from sflow_jax.families.sd3 import SD3

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX1, SD3)}


def published_models() -> dict[str, tuple[Family, Published]]:
    """Name → family and description of every model that is known without files."""
    return {name: (family, model) for family in FAMILIES.values() for name, model in family.published.items()}


def find_published(name: str) -> tuple[Family, Published] | None:
    """One of these by its name, or by its repository; None for others."""
    models = published_models()
    return models.get(name) or next((entry for entry in models.values() if name == entry[1].repository), None)
