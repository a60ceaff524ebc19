"""Candidate dims of a table: looked up at once, transformed to its width, made comparable, weighed (autodim.txt, II.B).

    output = sum over candidates n of  gate_n * BatchNorm(T_n(columns of n))          T_n: zero padding, or a linear map

Shapes: n bags, N candidates, W columns looked up, D the table's width.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embsearch_plugin.collection import Table
from embsearch_plugin.compact.fold import UNFOLDED, Fold
from embsearch_plugin.supernet.forms import Form, unrounded

Lookup = Literal["shared", "separate"]


class Candidate(NamedTuple):
    """A candidate dim: the first ``dim`` of ``stored`` columns, which begin at column ``start`` of what is looked up."""

    dim: int
    stored: int
    start: int


def candidates_of(table: Table, dims: Sequence[int], align: int, lookup: Lookup) -> tuple[Candidate, ...]:
    """Return a table's candidates, by rising dim: those that are not wider than the table.

    A dim is stored as the next multiple of ``align`` (or the table's own, if that is less). Candidates share columns, or lie
    side by side. None where all are wider than the table.
    """
    found: list[Candidate] = []
    start = 0
    for dim in dims:
        if dim > table.dim:
            break
        found.append(Candidate(dim, min(-(-dim // align) * align, table.dim), start))
        start += found[-1].stored if lookup == "separate" else 0
    return tuple(found)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm without an affine map (Eq. 2 and 3). A single bag, which has no variance, is normed as in evaluation."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``values`` (n, width) less their mean, by their standard deviation, times ``weights`` (width,)."""
        return self._normed(values, weights, self.running_mean, self.running_var)

    @classmethod
    def together(cls, norms: Sequence["BatchNorm"], values: Tensor, weights: Tensor) -> Tensor:
        """Return what all of them make of ``values`` that lie side by side, (n, sum of widths): one pass instead of many."""
        means, variances = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
        mean, var = torch.cat(means), torch.cat(variances)
        normed = norms[0]._normed(values, weights, mean, var)
        widths = [norm.num_features for norm in norms]
        for old, new in zip((*means, *variances), (*mean.split(widths), *var.split(widths)), strict=True):
            old.copy_(new)
        return normed

    def _normed(self, values: Tensor, weights: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        training = self.training and len(values) > 1
        return F.batch_norm(values, mean, var, weights, None, training, self.momentum or 0.0, self.eps)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return what evaluation multiplies by and adds, (width,) each."""
        scale = (self.running_var + self.eps).rsqrt()
        return scale, -self.running_mean * scale


class CandidateForm(Form):
    """Weighs a table's candidates; its gates are their weights.

    Args:
        dim: D.
        candidates: N of them.

    Attributes:
        shifts: whether what a candidate computes has a bias.
    """

    weighs: ClassVar[bool] = True
    shifts: ClassVar[bool] = True

    def __init__(self, dim: int, candidates: Sequence[Candidate]) -> None:
        super().__init__(max(c.start + c.stored for c in candidates), len(candidates))
        self.dim, self.candidates = dim, tuple(candidates)

    def fold(self, number: int) -> Fold:
        """Return what one candidate alone computes in evaluation, of its stored columns."""
        raise NotImplementedError


class OwnDim(CandidateForm):
    """A table without a choice, since every candidate is wider: it keeps its dim, and is left as it is."""

    shifts: ClassVar[bool] = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim, [Candidate(dim, dim, 0)])

    def forward(self, pooled: Tensor, gates: Tensor) -> Tensor:
        """Return what is pooled (n, D)."""
        return pooled

    def fold(self, number: int) -> Fold:
        """The columns are the plan's own."""
        return UNFOLDED


class PaddedCandidates(CandidateForm):
    """Candidates padded with zeros (Eq. 3, 4 and 7).

    Batch norm acts column by column, so columns that candidates share are normed once: candidate n reads the same values
    whether it is normed by itself or not. A column's weight is the sum of the gates of the candidates that read it.
    """

    reads: Tensor
    places: Tensor

    def __init__(self, dim: int, candidates: Sequence[Candidate]) -> None:
        super().__init__(dim, candidates)
        self.norm = BatchNorm(self.width)
        reads, places = torch.zeros(len(candidates), self.width), torch.zeros(self.width, dim)
        for number, candidate in enumerate(candidates):
            columns = torch.arange(candidate.dim)
            reads[number, candidate.start + columns] = 1
            places[candidate.start + columns, columns] = 1
        self.register_buffer("reads", reads, persistent=False)  # (N, W): which columns a candidate reads
        self.register_buffer("places", places, persistent=False)  # (W, D): which column of the output a column is added to
        self.in_place = torch.equal(places, torch.eye(dim))

    def forward(self, pooled: Tensor, gates: Tensor) -> Tensor:
        """Return the weighed sum (n, D) of what is pooled (n, W); gates are (1, N) or (n, N)."""
        with unrounded(pooled):
            return self._added(self.norm(pooled) * (gates @ self.reads))

    @classmethod
    def together(cls, forms: Sequence[Form], pooled: Tensor, gates: Sequence[Tensor]) -> Tensor | None:
        """Norm and weigh the columns of all tables at once."""
        padded = [form for form in forms if isinstance(form, PaddedCandidates)]
        if len(padded) < len(forms):
            return None
        with unrounded(pooled):
            weights = torch.cat([(gate @ form.reads)[0] for form, gate in zip(padded, gates, strict=True)])
            weighed = BatchNorm.together([form.norm for form in padded], pooled, weights)
            if all(form.in_place for form in padded):
                return weighed
            parts = weighed.split([form.width for form in padded], 1)
            return torch.cat([form._added(part) for form, part in zip(padded, parts, strict=True)], 1)

    def _added(self, weighed: Tensor) -> Tensor:
        """Pad with zeros and add up what is weighed (n, W): (n, D). One product is quicker than N paddings and sums."""
        return weighed if self.in_place else weighed @ self.places

    def fold(self, number: int) -> Fold:
        """The scale of batch norm goes into the weights, its shift into the bias; padded columns are zero."""
        dim, stored, start = self.candidates[number]
        scale, shift = (values[start : start + dim] for values in self.norm.affine_map())
        rotation = scale.new_zeros(self.width, stored)
        rotation[start : start + dim, :dim] = scale.diag()
        return Fold(rotation=rotation, bias=F.pad(shift, (0, self.dim - dim)))


class LinearCandidates(CandidateForm):
    """Candidates that each have a linear layer of their own (Eq. 1, 2 and 7).

    In training batch norm takes the layer's bias away again; it is kept as Eq. 1 has it.
    """

    def __init__(self, dim: int, candidates: Sequence[Candidate]) -> None:
        super().__init__(dim, candidates)
        self.layers = nn.ModuleList(nn.Linear(candidate.dim, dim) for candidate in candidates)
        self.norm = BatchNorm(len(candidates) * dim)

    def forward(self, pooled: Tensor, gates: Tensor) -> Tensor:
        """Return the weighed sum (n, D) of what is pooled (n, W); gates are (1, N) or (n, N)."""
        columns = [pooled[:, c.start : c.start + c.dim] for c in self.candidates]
        made = torch.cat([layer(part) for layer, part in zip(self.layers, columns, strict=True)], 1)
        normed = self.norm(made).unflatten(1, (self.n_gates, self.dim))
        return (normed * gates[:, :, None]).sum(1)

    def fold(self, number: int) -> Fold:
        """The layer and batch norm make one projection and one bias; padded columns are not read."""
        dim, stored, start = self.candidates[number]
        layer = self.layers[number]
        assert isinstance(layer, nn.Linear)
        scale, shift = (values.view(-1, self.dim)[number] for values in self.norm.affine_map())
        weight, bias = layer.weight.detach(), layer.bias.detach()
        projection = F.pad(weight.t() * scale, (0, 0, 0, stored - dim))
        return Fold(torch.arange(start, start + stored), projection=projection, bias=bias * scale + shift)


FORMS: dict[str, type[CandidateForm]] = {"padding": PaddedCandidates, "linear": LinearCandidates}
