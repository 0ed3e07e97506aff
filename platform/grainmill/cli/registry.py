"""Commands that choose the version of a model that users get: `grainmill promote` and `grainmill rollback`."""

from typing import Annotated

import typer

from grainmill import api
from grainmill.cli.console import clear_errors, say


def promote(
    model: Annotated[str, typer.Argument(help="models:/name/version or models:/name@alias.", metavar="MODEL_VERSION")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a gate, such as metric=NAME. Repeatable."),
    ] = None,
) -> None:
    """Make a version the champion, if it passes the gates and beats the champion.

    The gates are in the section promotion of the experiment file. The version must be better by more than the
    bootstrap interval, on the data on which the champion was evaluated. The champion before it becomes previous.

    Example: grainmill promote models:/demo@challenger --set metric=copydays/strong/map
    """
    with clear_errors():
        decision = api.promote(model, overrides or ())
        say(f"{decision.champion.uri} is the champion: {decision.why}")


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the registered model.", metavar="NAME")],
) -> None:
    """Make the version champion again that the present champion replaced.

    Example: grainmill rollback demo
    """
    with clear_errors():
        decision = api.rollback(name)
        say(f"{decision.champion.uri} is the champion: {decision.why}")
