"""Promotions that race on a tracking server."""

import os
import random
import subprocess
import sys
import textwrap

from commands import python_path
from shelf import Shelf, spread

RACER = """
    import sys
    from grainmill.registry import promotion
    from grainmill.errors import PromotionError
    uri, number = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        promotion.promote(uri, f"models:/apples/{number}", ["metric=copies/map"], lambda message: None)
        print("promoted")
    except PromotionError as error:
        print(error)
"""


def test_of_six_that_promote_at_once_on_a_server_the_best_is_champion_and_the_others_are_told(tracking_server):
    environment = {**os.environ, "PYTHONPATH": python_path()}
    shelf = Shelf.new(tracking_server.uri)
    order = random.Random(4).sample(range(1, 7), 6)  # of the versions 2 to 7, from the worst to the best
    shelf.add(*spread(0.2))
    for place in order:
        shelf.add(*spread(0.2 + 0.1 * place, seed=place))
    shelf.crown(1)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACER), tracking_server.uri, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2, 8)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = {number: racer.communicate()[0].strip() for number, racer in enumerate(racers, start=2)}
    best = order.index(6) + 2
    promoted = [number for number, text in said.items() if text == "promoted"]
    assert best in promoted
    for number, text in said.items():
        assert number in promoted or f"models:/apples/{number} does not become the champion: it must be better" in text
    # In turn, each better than the one before; `previous` is the last but one.
    crowned = sorted(
        (int(key[-6:]), number)
        for number in range(2, 8)
        for key, text in shelf.client.get_model_version("apples", str(number)).tags.items()
        if text.startswith("promoted: ")
    )
    means = [order[number - 2] for _, number in crowned]
    assert sorted(number for _, number in crowned) == sorted(promoted)
    assert means == sorted(means)
    chain = [1, *(number for _, number in crowned)]
    assert shelf.aliases() == {"champion": chain[-1], "previous": chain[-2]}
    assert chain[-1] == best
