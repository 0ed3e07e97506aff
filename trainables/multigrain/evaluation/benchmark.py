"""A benchmark: images, the right answers for them, and the measures that are reported. No torch is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from multigrain.data.picture import Picture
from multigrain.retrieval.metrics import Truth


@dataclass(frozen=True)
class Benchmark:
    """A set of images with its protocol: a retrieval protocol, with `truth`, or a classification one, with `labels`."""

    name: str
    database: tuple[Picture, ...]
    queries: tuple[Picture, ...]
    truth: Mapping[str, tuple[Truth, ...]]
    """Part of the protocol -> the truth of each query; the part is "" where the protocol has but one."""
    measures: tuple[str, ...]
    """Names of the measures; the first is the one that the literature compares."""
    labels: tuple[int, ...] | None = None
    """Class of each query, an index into `classes`."""
    classes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Missing and extra files compared with the published set, one sentence each."""

    def __post_init__(self) -> None:
        assert all(len(truths) == len(self.queries) for truths in self.truth.values())
        assert self.labels is None or len(self.labels) == len(self.queries)

    @property
    def as_published(self) -> bool:
        """True when the files are exactly those of the published set."""
        return not self.problems

    def part(self, name: str) -> tuple["Benchmark", list[int]]:
        """Return the benchmark with the queries of one part of its protocol, and their positions among all queries.

        A query whose truth calls the whole database junk belongs to other parts.
        """
        truths = self.truth[name]
        asked = [query for query, one in enumerate(truths) if len(one.junk) < len(self.database)]
        queries = tuple(self.queries[query] for query in asked)
        return replace(self, queries=queries, truth={name: tuple(truths[query] for query in asked)}), asked
