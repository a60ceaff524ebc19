"""A plan on a fresh model, and saving a compact model with its plan."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embsearch_plugin.compact.collection import CompactEmbeddingBagCollection
from embsearch_plugin.compact.rewrite import compact_form, slices_of
from embsearch_plugin.errors import PlanError
from embsearch_plugin.files import atomic
from embsearch_plugin.fused import mark_alike
from embsearch_plugin.plan import SizePlan, TablePlan, mismatch
from embsearch_plugin.plugins import find_collections
from embsearch_plugin.search.tables import refuse_ties

PLAN, WEIGHTS = "plan.json", "model.safetensors"


def apply(model: nn.Module, plan: SizePlan) -> nn.Module:
    """Rewrite a model that is not searched, in place, with tables as ``plan`` wants them; return it.

    The kept weights are the model's own: a fresh model stays fresh, a trained one is pruned in one shot. Where the plan has a
    projection, that starts as the identity: the searched model's own basis is what :meth:`Session.compact` knows, not a plan.
    Tables that TorchRec's ``apply_optimizer_in_backward`` marked stay marked, and begin with a new optimizer state.

    Raises:
        PlanError: where the plan is for another model.
        UnsupportedCollection: where the model uses a table's weights elsewhere too.
    """
    found = find_collections(model)
    tables = [table for collection in found for table in collection.tables]
    if tables != [p.table for p in plan.tables]:
        raise PlanError(mismatch(tables, plan))
    for collection in found:
        refuse_ties(model, collection)
    for collection in found:
        plans = plan.for_collection(collection.paths[0])
        compact = compact_form(collection, plans, collection.module.training)
        for index, table in enumerate(collection.tables):
            weight = collection.module.get_parameter(f"embedding_bags.{table.name}.weight")
            for part in slices_of(compact, index, plans[index]):
                part.fill(weight)
                mark_alike(weight, part.new)
        collection.replace_in(model, compact)
    return model


def save(model: nn.Module, plan: SizePlan, folder: str | Path) -> None:
    """Write a compact model's plan and weights into ``folder``, without pickle; each file atomically.

    Raises:
        PlanError: where ``model`` is not the compact model of ``plan``.
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose state has other names
    _check_is_of(plan, model)
    with atomic(folder / WEIGHTS) as temporary:
        save_file(_unique(model), temporary)
    plan.save(folder / PLAN)


def _check_is_of(plan: SizePlan, model: nn.Module) -> None:
    """Make sure that a model's compact collections are those of the plan, and where it says."""
    stored = {path: m for path, m in model.named_modules() if isinstance(m, CompactEmbeddingBagCollection)}
    if [p.table for p in plan.tables] != [table for compact in stored.values() for table in compact.tables]:
        raise PlanError(
            "save takes a compact model and its plan; this model's tables are not the plan's.\n"
            "  Possible solution: es.save(session.compact(plan), plan, folder)."
        )
    for path, compact in stored.items():
        plans = plan.for_collection(path)
        if [p.table for p in plans] != list(compact.tables):
            raise PlanError(
                f"save takes the model that was compacted, not one around it: {compact.tables[0].collection!r} of the plan is "
                f"{path!r} here.\n  Possible solution: es.save(model.module, plan, folder), where the model is in a wrapper."
            )
        if not _stores(compact, plans):
            raise PlanError(
                f"{path!r} does not store the rows and columns of this plan, but those of another for the same tables.\n"
                "  Possible solution: save the model with the plan that compact or apply was given."
            )


def _stores(compact: CompactEmbeddingBagCollection, plans: Sequence[TablePlan]) -> bool:
    """Whether a collection has the tensors that ``plans`` ask for, and in its buffers what they say."""
    built = CompactEmbeddingBagCollection(
        compact.embedding_bag_configs(), plans, compact.is_weighted(), torch.device("meta")
    ).state_dict()
    state = compact.state_dict()
    return built.keys() == state.keys() and all(
        state[name].shape == tensor.shape and (tensor.is_meta or torch.equal(state[name].cpu(), tensor))
        for name, tensor in built.items()
    )


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Rewrite ``model`` (fresh, not searched) as saved in ``folder``, load its weights, and return it.

    Raises:
        PlanError: where a file is missing or damaged, or the plan is for another model.
    """
    folder = Path(folder)
    plan = SizePlan.load(folder / PLAN)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"cannot read {folder / WEIGHTS}: {error}. Save the model again.") from error
    model = apply(model, plan)
    wanted = {name for name, _ in _named(model)}
    if wanted != weights.keys():
        missing, extra = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
        raise PlanError(f"{folder / WEIGHTS} is for another model: it lacks {missing[:3]} and has {extra[:3]} besides.")
    pairs = [(weights[name], index.cpu()) for name, index in _index(model).items() if name in weights]
    if any(theirs.shape == mine.shape and not torch.equal(theirs, mine) for theirs, mine in pairs):
        raise PlanError(
            f"{folder / PLAN} and {folder / WEIGHTS} are of two plans, as where a save was interrupted. Save the model again."
        )
    assign = any(p.is_meta for p in model.parameters())
    try:
        model.load_state_dict(_replacements(model, weights) if assign else weights, strict=False, assign=assign)
    except RuntimeError as error:
        raise PlanError(f"{folder / WEIGHTS} is for another model: {error}") from error
    return model


def _index(model: nn.Module) -> dict[str, Tensor]:
    """Return what compact collections hold that is the plan's, and not trained, by its name in the model's state."""
    compact = {path: m for path, m in model.named_modules() if isinstance(m, CompactEmbeddingBagCollection)}
    return {f"{path}.{name}" if path else name: b for path, m in compact.items() for name, b in m.named_buffers()}


def _named(model: nn.Module) -> Collection[tuple[str, Tensor]]:
    """Return the tensors of the model's state with one name each, though aliases have several."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return named.values()


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with one name per tensor, each with memory of its own."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in _named(model)}


def _replacements(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what takes the place of the model's tensors, under each of their names: aliases stay one."""
    state = model.state_dict(keep_vars=True)
    made = {id(old): _replacement(old, weights[name]) for name, old in state.items() if name in weights}
    return {name: made[id(old)] for name, old in state.items()}


def _replacement(old: Tensor, loaded: Tensor) -> Tensor:
    """Return a loaded tensor as what ``old`` is: a buffer, or a parameter that is frozen or trained alike."""
    if not isinstance(old, nn.Parameter):
        return loaded
    new = nn.Parameter(loaded, old.requires_grad)
    mark_alike(old, new)
    return new
