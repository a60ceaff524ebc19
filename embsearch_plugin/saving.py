"""A plan on a fresh model, and saving a compact model with its plan."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.compact.rewrite import fill, put_in_place, slices_of
from embsearch_plugin.errors import PlanError
from embsearch_plugin.files import atomic
from embsearch_plugin.plan import SizePlan, mismatch
from embsearch_plugin.plugins import find_collections

PLAN, WEIGHTS = "plan.json", "model.safetensors"


def apply(model: nn.Module, plan: SizePlan) -> nn.Module:
    """Rewrite a model that is not searched, in place, with tables as ``plan`` wants them; return it.

    The kept weights are the model's own: a fresh model stays fresh, a trained one is pruned in one shot.

    Raises:
        PlanError: where the plan is for another model.
    """
    found = find_collections(model)
    tables = [table for collection in found for table in collection.tables]
    if tables != [p.table for p in plan.tables]:
        raise PlanError(mismatch(tables, plan))
    for collection in found:
        compact = put_in_place(model, collection, plan.for_collection(collection.paths[0]))
        for index, table in enumerate(collection.tables):
            weight = collection.module.get_parameter(f"embedding_bags.{table.name}.weight")
            for part in slices_of(compact, index):
                if not weight.is_meta:
                    fill(part, weight)
    return model


def save(model: nn.Module, plan: SizePlan, folder: str | Path) -> None:
    """Write a compact model's plan and weights into ``folder``, without pickle; each file atomically.

    Raises:
        PlanError: where ``model`` is not the compact model of ``plan``.
    """
    folder = Path(folder)
    planned = [p.table for p in plan.tables]
    present = [p.table for m in model.modules() if isinstance(m, CompactEmbeddingBagCollection) for p in m.plans]
    if planned != present:
        raise PlanError(
            "save takes a compact model and its plan; this model's tables are not the plan's.\n"
            "  Possible solution: es.save(session.compact(plan), plan, folder)."
        )
    with atomic(folder / WEIGHTS) as temporary:
        save_model(model, str(temporary))
    plan.save(folder / PLAN)


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Rewrite ``model`` (fresh, not searched) as saved in ``folder``, load its weights, and return it.

    Raises:
        PlanError: where a file is missing or damaged, or the plan is for another model.
    """
    folder = Path(folder)
    model = apply(model, SizePlan.load(folder / PLAN))
    try:
        load_model(model, folder / WEIGHTS)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PlanError(f"cannot load {folder / WEIGHTS} into this model: {error}") from error
    return model
