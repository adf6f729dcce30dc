"""Clusters: a student's and a teacher's choice among prototypes. B samples, V views, P prototypes, E numbers in a row.

Rows come as they stand before the last layer, and prototypes beside them: of 65,536 prototypes the logits of one batch fill a
GPU, so they are made for a few rows at a time, and again in the backward pass. Sinkhorn's assignments are a softmax too, with
a centre that the batch itself decides; so both ways of centring are one loss here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitssl.losses.precision import full_precision

LOGITS = 1 << 26  # numbers of the largest tensor of logits: 256 MiB in fp32


def pair_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    shared: bool = True,
    logits: int = LOGITS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, entropy of the teacher's choices, scalars in nats, and their mean [P]): each of its crops teaches all others.

    student [B, V, E] with the T crops that the teacher saw as the first of V, teacher [B, T, E], prototypes [P, E] each,
    centre [P]. Mean over samples and over the T x V - T pairs. DINO (Caron et al. 2021, algorithm 1 and equation 3); DINOv2
    weighs its two kinds of crops to the same mean. Not ``shared``: the teacher saw crops of its own, and there are T x V pairs
    (MSN, Assran et al. 2022). No gradient reaches the teacher. At most ``logits`` numbers at a time.
    """
    num, crops, taught = len(student), student.shape[1], teacher.shape[1]

    def some(student: Tensor, teacher: Tensor) -> Tensor:
        choice = _choices(teacher, teacher_prototypes, centre, teacher_temperature)
        return _pairs(F.linear(student, prototypes), *choice, temperature=temperature, shared=shared)

    sums = _in_parts(some, student, teacher, width=(crops + taught) * len(prototypes), logits=logits)
    chosen = sums[1:].detach() / (num * taught)
    return sums[0] / (num * taught * (crops - shared)), chosen[0], chosen[1:]


def row_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    logits: int = LOGITS,
) -> Tensor:
    """Scalar in nats: the sum of ``weights`` x cross entropy over rows, each of which is taught by its own.

    student, teacher [R, E] (also no row at all), weights [R], the others as in :func:`pair_cross_entropy`. The masked patches
    of iBOT (Zhou et al. 2022, equation 2).
    """

    def some(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        assigned, _ = _choices(teacher, teacher_prototypes, centre, teacher_temperature)
        return _rows(F.linear(student, prototypes), assigned, weights, temperature=temperature)

    return _in_parts(some, student, teacher, weights, width=2 * len(prototypes), logits=logits)


def mean_entropy(
    rows: Tensor,
    prototypes: Tensor,
    *,
    temperature: float,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    logits: int = LOGITS,
) -> Tensor:
    """Scalar in nats: the entropy of the mean choice of all rows; ln P where together they use every prototype alike.

    rows [R, E] of this process, prototypes [P, E]; ``total`` sums over processes, with gradient. What MSN makes large (Assran
    et al. 2022, equation 1; me-max).
    """

    def some(rows: Tensor) -> Tensor:
        return _chosen(F.linear(rows, prototypes), temperature=temperature)

    sums = total(_in_parts(some, rows, width=len(prototypes), logits=logits))
    mean = sums / sums.sum()  # a row's choice sums to 1
    return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


@torch.no_grad()
def sinkhorn_centre(
    rows: Tensor,
    prototypes: Tensor,
    *,
    temperature: float,
    iterations: int = 3,
    rows_first: bool = False,
    gather: Callable[[Tensor], Tensor] = lambda own: own,
    logits: int = LOGITS,
) -> Tensor:
    """[P]: the centre under which softmax((logits - centre) / temperature) are Sinkhorn-Knopp's assignments of all rows.

    rows [R, E] of this process; ``gather`` [1, P] -> [processes, P] brings those of all together. Prototypes and rows are made
    equally likely in turn, prototypes first, as in SwAV (Caron et al. 2020, appendix A) and DINOv2; a row's last turn is the
    softmax. With ``rows_first`` rows have one turn before all (MSN's official code). In logarithms, so that no exponent
    overflows.
    """
    potential = prototypes.new_zeros(len(prototypes)) if rows_first else None
    for _ in range(iterations):
        parts = []
        for some in rows.split(max(1, logits // len(prototypes))):
            scaled = _wide(F.linear(some, prototypes)) / temperature  # [r, P]
            if potential is not None:
                scaled = scaled - torch.logsumexp(scaled - potential, dim=1, keepdim=True)
            parts.append(torch.logsumexp(scaled, dim=0))
        potential = torch.logsumexp(gather(torch.logsumexp(torch.stack(parts), dim=0)[None]), dim=0)
    return temperature * potential


@full_precision
def koleo(rows: Tensor, everybody: Tensor, own: Tensor, *, group: int | None = None, eps: float = 1e-8) -> Tensor:
    """Scalar in nats: minus the logarithm of each row's distance from its nearest neighbour on the sphere, mean over rows.

    rows [B, D] of this process, everybody [A, D], own [B] int64: where the former stand among the latter. With ``group`` only
    rows of the same group of so many look at each other (official codes: those of a process); one that is alone counts 0.
    The gradient reaches neighbours too. Kozachenko-Leonenko; Sablayrolles et al. 2019, DINOv2 (Oquab et al. 2024, section 4).
    """
    rows, everybody = F.normalize(rows, eps=eps, dim=-1), F.normalize(everybody, eps=eps, dim=-1)
    others = torch.arange(len(everybody), device=own.device)
    far = others == own[:, None]
    if group is not None:
        far = far | (others // group != own[:, None] // group)
    with torch.no_grad():
        nearest = (rows @ everybody.T).masked_fill(far, -2.0).argmax(dim=1)
    distance = (rows - everybody[nearest] + eps).norm(dim=-1)
    return -torch.log(distance + eps).masked_fill(far.all(dim=1), 0.0).mean()


def _in_parts(function: Callable[..., Tensor], *rows: Tensor, width: int, logits: int) -> Tensor:
    """The sum of ``function`` over parts of the rows; where there are several, each is computed again for its gradient."""
    size = max(1, logits // width)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = zip(*(each.split(size) for each in rows), strict=True)
    return sum(checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)


@torch.no_grad()
def _choices(rows: Tensor, prototypes: Tensor, centre: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(probabilities [..., P], their entropies [...])."""
    log = F.log_softmax((_wide(F.linear(rows, prototypes)) - centre) / temperature, dim=-1)
    chosen = log.exp()
    return chosen, -(chosen * log).sum(dim=-1)


@full_precision
def _pairs(student: Tensor, assigned: Tensor, entropies: Tensor, *, temperature: float, shared: bool) -> Tensor:
    """[2 + P]: sums of cross entropies over pairs, of entropies, of choices. student [b, V, P] logits, assigned [b, T, P]."""
    student = student / temperature
    losses = torch.logsumexp(student, dim=-1)[:, None] - assigned @ student.mT  # [b, T, V]: -sum of q log p, as q sums to 1
    if shared:
        losses = losses.masked_fill(torch.eye(*losses.shape[1:], dtype=torch.bool, device=losses.device), 0.0)
    sums = losses.sum(), entropies.sum()
    return torch.cat([torch.stack(sums), assigned.sum(dim=(0, 1))])


@full_precision
def _chosen(rows: Tensor, *, temperature: float) -> Tensor:
    return F.softmax(rows / temperature, dim=-1).sum(dim=0)


@full_precision
def _rows(student: Tensor, assigned: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    student = student / temperature
    return (weights * (torch.logsumexp(student, dim=-1) - (assigned * student).sum(dim=-1))).sum()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
