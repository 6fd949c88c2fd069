"""Clusters around peaks of density, as several methods of visual tokens form them."""

import torch
from torch import Tensor


def density_peaks(x: Tensor, clusters: int, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
    """DPC-kNN: ``clusters`` tokens of ``x`` ``[n, C]`` that are dense and far from denser ones.

    With distances ``d_ij = |x_i - x_j| / sqrt(C)``: density ``exp(-mean d^2)`` over the nearest
    ``neighbours`` (default: as many as clusters), the token itself among them; separation the distance to the
    nearest denser token, the largest of all where there is none. Centers have the largest products of both;
    every other token goes to the nearest center. Ties: the lower token.

    Returns ``center`` ``[k]`` int64, best first, and ``target`` ``[n]`` int64, its rank for every token.
    """
    n = x.shape[0]
    clusters, near = min(clusters, n), min(neighbours or clusters, n)
    distance = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / x.shape[1] ** 0.5
    density = (-distance.sort(1).values[:, :near].square().mean(1)).exp()
    token = torch.arange(n, device=x.device)
    same = density[None] == density[:, None]
    denser = (density[None] > density[:, None]) | (same & (token[None] < token[:, None]))
    apart = torch.where(denser, distance, distance.max()).amin(1)
    center = (density * apart).argsort(descending=True, stable=True)[:clusters]
    target = distance[:, center].argmin(1)
    return center, target.scatter(0, center, torch.arange(clusters, device=x.device))
