"""Time and error of whitening 20,000 embeddings of 2,048 channels: ours against scikit-learn's PCA in fp32.

    python -m tests.benchmarks.whitening [--device cuda] [--rounds 3]

The error is the largest entry of |cov(z) - I| over the fitted embeddings, with the covariance in fp64.
"""

import argparse
import time
from functools import partial

import torch
from sklearn.decomposition import PCA

from multigrain.models.multigrain import l2_normalise
from multigrain.models.whitening import Whitening
from tests.benchmarks.table import Goal, compare, machine, report

ROWS, CHANNELS = 20_000, 2048


def embeddings():
    """Non-negative embeddings in fp32; when normalised, their covariance has a condition number above 1e7."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -3.6, CHANNELS)
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0]
    return (0.2 + 0.01 * torch.randn(ROWS, CHANNELS, generator=generator) * spread @ rotation).clamp(min=0)


def normalised(x):
    """Input of both contestants: l2([e; 1]) in fp32."""
    return l2_normalise(torch.nn.functional.pad(x, (0, 1), value=1.0))


def ours(x):
    return Whitening.fit(x).project


def ours_in_chunks(x):
    return Whitening.fit(x.split(256)).project


def by_sklearn(x):
    v = normalised(x).cpu().numpy()
    pca = PCA(whiten=True).fit(v)
    return lambda x: torch.from_numpy(pca.transform(normalised(x).cpu().numpy()))


def in_fp32(x):
    """Fit by the eigenvectors of the covariance, all in fp32."""
    v = normalised(x)
    mean = v.mean(dim=0)
    variances, directions = torch.linalg.eigh((v - mean).T @ (v - mean) / (len(v) - 1))
    projection = directions / variances.clamp(min=1e-10 * float(variances[-1])).sqrt()
    return lambda x: (normalised(x) - mean) @ projection


def gram(x):
    """The lower bound: the matrix product that every fit in fp64 computes."""
    v = normalised(x).double()
    return v.T @ v


def seconds(fit, x):
    started = time.perf_counter()
    fit(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def error(fit, x):
    covariance = torch.cov(fit(x)(x).double().T)
    return float((covariance - torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    before, x = machine(), embeddings().to(options.device)
    variances = torch.linalg.eigvalsh(torch.cov(normalised(x.double()).T))
    print(f"condition number {float(variances[-1] / variances[0]):.1e}")
    fits = {"ours": ours, "ours, in chunks of 256": ours_in_chunks, "sklearn": by_sklearn, "fp32": in_fp32}
    for name, fit in fits.items():
        found = error(fit, x)  # and warm
        met = f", goal 1e-4: {'met' if found <= 1e-4 else 'missed'}" if fit is ours else ""
        print(f"{name}: largest |cov - I| {found:.1e}{met}")
    contestants = {name: partial(seconds, fit, x) for name, fit in {**fits, "Gram in fp64": gram}.items()}
    figures = compare(contestants, options.rounds)
    goals = [Goal("ours", "sklearn", 2.5), Goal("ours", "ours, in chunks of 256"), Goal("Gram in fp64", "ours")]
    report("whitening", figures, goals, before, "seconds", more_is_better=False)


if __name__ == "__main__":
    main()
