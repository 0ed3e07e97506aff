"""Commands that use a model: `grainmill embed`, `find` and `duplicates`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from grainmill.cli.console import FAILURE, clear_errors, err, out, prepare_process, show_progress, tracking_uri

Model = Annotated[str, typer.Argument(help="models:/name@alias or models:/name/version.")]
Folder = Annotated[Path, typer.Argument(help="Folder that `grainmill embed` wrote.", metavar="INDEX")]


def embed(
    model: Model,
    images: Annotated[
        str, typer.Argument(help="A folder, a manifest (.csv with a column image) or s3://bucket/prefix.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the index.")],
    workers: Annotated[int, typer.Option(min=1, help="That each hold the model, on an equal share of the CPUs.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to use, such as auto; a local Ray is started by default. Its nodes must see the images "
            "and the tracking server.",
            envvar="RAY_ADDRESS",
        ),
    ] = None,
) -> None:
    """Embed all images of a corpus into an index of Parquet files.

    Started again, it carries on where it was cut short, and adds images that are new. Files that are no images are
    listed in skipped.csv, and tried again the next time.
    """
    with clear_errors():
        prepare_process()
        from grainmill.corpus import embed as corpus

        done = corpus.embed(tracking_uri(), model, images, folder, workers, address, show_progress)
        told = f"{done.images:,} images in {folder.absolute()}, {done.before:,} of them from before"
        out.print(told, markup=False, highlight=False, soft_wrap=True)
        if done.steady:
            out.print(f"{done.steady / done.seconds:.1f} images a second", highlight=False)
        if done.skipped:
            told = f"{done.faults:,} skipped, listed in {done.skipped.absolute()}"
            err.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)


def find(
    model: Model,
    folder: Folder,
    queries: Annotated[list[str], typer.Argument(help="Image files.", metavar="QUERY...")],
    count: Annotated[int, typer.Option("--count", min=1, help="Images to find for each query.")] = 10,
    page: Annotated[Path, typer.Option("--page", help="HTML file that shows them.")] = Path("found.html"),
) -> None:
    """Find the images of an index that are nearest to others, with scores and a page of pictures.

    Scores are dot products of unit vectors, at most 1. Every image is compared.
    """
    with clear_errors():
        prepare_process()
        from grainmill.corpus import query

        found = query.find(tracking_uri(), model, folder, queries, count, page)
        table = Table("query", "score", "image")
        for one in found:
            for number, (score, name) in enumerate(zip(one.scores, one.ids, strict=True)):
                table.add_row("" if number else one.query, f"{score:.4f}", name)
        out.print(table)
        out.print(str(page.absolute()), markup=False, highlight=False, soft_wrap=True)
        wrong = [f"{one.query} is no image: {one.error}" for one in found if one.error]
        for line in wrong:
            err.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if wrong:
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
        Path | None, typer.Option("--out", help="Folder for duplicates.csv and duplicates.html; by default the index.")
    ] = None,
) -> None:
    """List pairs of images of an index that are copies of each other.

    All pairs are compared. The precision is estimated from the index alone: of each image, the 6th to 50th nearest
    neighbours are taken for different images. How fast their number grows with the distance, scaled so that it explains
    the nearest neighbour of the median image, tells how many pairs of different images score as high as those that are
    listed; the others count as copies. The estimate is meant to be too low rather than too high, but a
    short series of nearly equal pictures counts as copies.
    """
    with clear_errors():
        prepare_process()
        from grainmill.corpus import query

        found = query.duplicates(folder, precision, threshold, place or folder)
        table = Table("score", "precision", "first", "second")
        sure = ["unknown" if estimate is None else f"{estimate:.1%}" for estimate in found.precision]
        for score, told, pair in list(zip(found.scores, sure, found.pairs, strict=True))[: max(1, out.height - 12)]:
            table.add_row(f"{score:.4f}", told, *pair)
        if found.pairs:
            out.print(table)
            rule = f"{len(found.pairs):,} pairs score {found.scores[-1]:.4f} or more"
            out.print(f"{rule}; estimated precision {sure[-1]}", highlight=False)
        else:
            rule = f"an estimated precision of {precision:.0%}" if threshold is None else f"{threshold:g}"
            out.print(f"no pairs reach {rule}", highlight=False)
        if found.more:
            err.print("there are more, which score less: raise --threshold to see a list that is whole", style="yellow")
        for file in found.files:
            out.print(str(file.absolute()), markup=False, highlight=False, soft_wrap=True)
