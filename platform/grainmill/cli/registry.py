"""Commands that say which version of a model is for users: `grainmill promote` and `grainmill rollback`."""

from typing import Annotated

import typer

from grainmill.cli.console import clear_errors, out, prepare_process, tracking_uri


def promote(
    model: Annotated[str, typer.Argument(help="models:/name/version or models:/name@alias.", metavar="MODEL_VERSION")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a gate of the experiment file, such as metric=NAME. Repeatable."
        ),
    ] = None,
) -> None:
    """Make a version the champion, if it passes the gates and beats the champion beyond the bootstrap interval.

    Both must have been evaluated on the same data. The champion before it becomes `previous`.
    """
    with clear_errors():
        prepare_process()
        from grainmill.registry import promotion

        done = promotion.promote(tracking_uri(), model, overrides or (), _note)
        out.print(f"{done.champion.uri} is the champion: {done.why}", markup=False, highlight=False, soft_wrap=True)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the registered model.", metavar="NAME")],
) -> None:
    """Make the version the champion again of which the champion took the place."""
    with clear_errors():
        prepare_process()
        from grainmill.registry import promotion

        done = promotion.rollback(tracking_uri(), name, _note)
        out.print(f"{done.champion.uri} is the champion: {done.why}", markup=False, highlight=False, soft_wrap=True)


def _note(message: str) -> None:
    out.print(message, style="dim", markup=False, highlight=False, soft_wrap=True)
