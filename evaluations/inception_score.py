"""Inception Score (Salimans et al. 2016, arXiv:1606.03498, Section 4)."""

import math

import numpy as np
import torch


def inception_score(activations, weight, split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))), averaged over consecutive splits of `split_size` rows; the last may be shorter.

    p(y|x) = softmax(activations @ weight^T) without bias: activations (N, d), weight (classes, d), arrays or tensors.
    Works in float64 with log-softmax, so that probabilities that underflow count as 0 and not as NaN.
    """
    activations, weight = torch.as_tensor(activations), torch.as_tensor(weight).double()
    if activations.ndim != 2 or weight.ndim != 2 or activations.shape[1] != weight.shape[1]:
        raise ValueError(f"activations {tuple(activations.shape)} do not fit weight {tuple(weight.shape)}")
    if split_size < 1 or not len(activations):
        raise ValueError(f"need rows and a positive split size, got {len(activations)} and {split_size}")
    weight = weight.to(activations.device)
    scores = []
    for part in activations.split(split_size):
        log_p = (part.double() @ weight.T).log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(1).mean()
        scores.append(float(divergence.exp()))
    return float(np.mean(scores))
