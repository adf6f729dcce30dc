"""Weighted k-nearest-neighbour classification (Wu et al. 2018), with the vote of DINO's protocol."""

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Votes [Q, C] for ``queries`` [Q, D] from the bank ``features`` [N, D] with ``labels`` [N].

    Rows are normalised to unit length; each of the ``k`` most similar rows votes exp(cosine / temperature) for its class, in
    float64, which holds any temperature from 0.002 on. ``k`` is cut to N. Rows are taken ``chunk`` at a time.
    """
    bank, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    votes = []
    for part in queries.split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [q, k]
        ballot = torch.zeros(len(part), num_classes, dtype=torch.float64, device=bank.device)
        votes.append(ballot.scatter_add_(1, labels[nearest], (similarity.double() / temperature).exp()))
    return torch.cat(votes)


def knn_accuracy(
    features: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in [0, 1] of the weighted vote; ``answers`` [Q] are the queries' labels."""
    num_classes = int(torch.maximum(labels.max(), answers.max())) + 1
    votes = knn_votes(features, labels, queries, num_classes=num_classes, k=k, temperature=temperature)
    return (votes.argmax(dim=1) == answers).double().mean().item()
