"""Commands that use a model: `grainmill embed`, `find` and `duplicates`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from grainmill import api
from grainmill.cli.console import FAILURE, Address, clear_errors, complain, print_table, say
from grainmill.progress import out

Model = Annotated[str, typer.Argument(help="models:/name@alias or models:/name/version.")]
Folder = Annotated[Path, typer.Argument(help="Folder that `grainmill embed` wrote.", metavar="INDEX")]


def embed(
    model: Model,
    images: Annotated[
        str, typer.Argument(help="A folder, a manifest (.csv with a column image) or s3://bucket/prefix.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the index.")],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that each hold the model, on an equal share of the CPUs.")
    ] = 1,
    address: Address = None,
) -> None:
    """Embed all images of a corpus into an index of Parquet files.

    Started again, the command carries on where it was cut short, embeds images that are new or have changed, and
    drops those that are gone. Files that are no images are listed in INDEX.reports/skipped.csv, and tried again the
    next time. A cluster at --address must see the images and the tracking server.

    Example: grainmill embed models:/demo@champion photos --out index --workers 2
    """
    with clear_errors():
        done = api.embed(model, images, folder, workers=workers, address=address)
        say(f"{done.images:,} images in {folder.absolute()}, {done.before:,} of them from before")
        if done.rate:
            say(f"{done.rate:.1f} images a second")
        if done.skipped:
            complain(f"{done.faults:,} skipped, listed in {done.skipped.absolute()}", "yellow")


def find(
    model: Model,
    folder: Folder,
    queries: Annotated[list[str], typer.Argument(help="Image files.", metavar="QUERY...")],
    count: Annotated[int, typer.Option("--count", min=1, help="Images to find for each query.")] = 10,
    page: Annotated[Path, typer.Option("--page", help="HTML file that shows them.")] = Path("found.html"),
) -> None:
    """Find the images of an index that are nearest to others, with scores and a page of pictures.

    Scores are dot products of unit vectors, at most 1. Every image of the index is compared.

    Example: grainmill find models:/demo@champion index query.jpg --count 5
    """
    with clear_errors():
        results = api.find(model, folder, queries, count=count, page=page)
        rows = [
            ("" if number else one.query, f"{score:.4f}", name)
            for one in results
            for number, (score, name) in enumerate(zip(one.scores, one.ids, strict=True))
        ]
        print_table(("query", "score", "image"), rows)
        say(shlex.quote(str(page.absolute())))
        for one in results:
            if one.error:
                complain(f"{one.query} is no image: {one.error}")
        if any(one.error for one in results):
            raise typer.Exit(FAILURE)


def duplicates(
    folder: Folder,
    precision: Annotated[
        float, typer.Option(min=0.01, max=0.999, help="Estimated share of copies in the list; sets the threshold.")
    ] = 0.9,
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Lowest score to list, instead of --precision.")
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of duplicates.csv and .html; INDEX.reports by default."),
    ] = None,
) -> None:
    """List pairs of images of an index that are copies of each other.

    Equal images, of the same bytes or the same embedding, are listed as groups in equal.csv, and one of each group is
    compared with all others. The precision is estimated from the index alone. The 6th to 50th nearest neighbours of
    each image are taken for different images. The growth of their number with the distance, scaled to explain the
    nearest neighbour of the median image, gives the expected number of pairs of different images among the listed
    ones; the other pairs count as copies. The estimate is rather too low than too high, but a short series of nearly
    equal pictures counts as copies.

    Example: grainmill duplicates index --precision 0.95
    """
    with clear_errors():
        found = api.duplicates(folder, precision=precision, threshold=threshold, out=place)
        estimates = ["unknown" if estimate is None else f"{estimate:.1%}" for estimate in found.precision]
        rows = [
            (f"{score:.4f}", estimate, *pair)
            for score, estimate, pair in zip(found.scores, estimates, found.pairs, strict=True)
        ]
        if found.groups:
            equal = sum(map(len, found.groups))
            say(f"{len(found.groups):,} groups of equal images, {equal:,} in all; below, one stands for each")
        if rows:
            print_table(("score", "precision", "first", "second"), rows[: max(1, out.height - 12)])
            rule = f"{len(rows):,} pairs score {found.scores[-1]:.4f} or more"
            say(f"{rule}; estimated precision {estimates[-1]}")
        else:
            rule = f"an estimated precision of {precision:.0%}" if threshold is None else f"{threshold:g}"
            say(f"no pairs of different images reach {rule}")
        if found.more:
            complain("there are more, which score less: raise --threshold to see a list that is whole", "yellow")
        for file in found.files:
            say(shlex.quote(str(file.absolute())))
