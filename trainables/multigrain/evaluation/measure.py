"""Measures of a network's embeddings on a benchmark."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from multigrain import distributed
from multigrain.evaluation.benchmark import Benchmark
from multigrain.models.multigrain import MultiGrain
from multigrain.retrieval import ranking
from multigrain.retrieval.metrics import MEASURES, Floats

Embeddings = NDArray[np.float32]


class Retrieval(NamedTuple):
    """The search of a benchmark's database for the queries of one part of its protocol."""

    benchmark: Benchmark
    """The benchmark with this part and its queries alone, see `Benchmark.part`."""
    queries: Embeddings
    """Descriptors (Q, D)."""
    database: Embeddings
    """Descriptors (N, D)."""
    ranks: list[NDArray[np.int64]]
    """Ranks of each query's positives, see `ranking.ranks`."""
    values: dict[str, Floats]
    """Measure -> one value for each query with a positive; measures of pairs are left out."""


def retrieve(
    benchmark: Benchmark, part: str, database: Embeddings, queries: Embeddings, device: torch.device
) -> Retrieval:
    """Rank the database for each query of one part of a benchmark's protocol.

    With a process group, every rank must call it; the ranks share the queries.

    Args:
        database: descriptors (N, D) of unit norm.
        queries: descriptors of all queries of the benchmark.
    """
    benchmark, asked = benchmark.part(part)
    truth, rows = benchmark.truth[part], queries[asked]
    ranks = distributed.share_work(lambda share: ranking.ranks(rows[share], database, truth[share], device))
    measures = {name: MEASURES[name] for name in benchmark.measures if MEASURES[name].source == "ranks"}
    return Retrieval(benchmark, rows, database, ranks, {name: one.values(ranks) for name, one in measures.items()})


def classify(
    benchmark: Benchmark, network: MultiGrain, embeddings: Embeddings, device: torch.device
) -> dict[str, Floats]:
    """Classify the embeddings (Q, C) of a benchmark's queries: for each measure, a value for each query."""
    logits = network.head(torch.from_numpy(embeddings).to(device)).logits.cpu().numpy()
    return {name: MEASURES[name].values(logits, np.array(benchmark.labels)) for name in benchmark.measures}
