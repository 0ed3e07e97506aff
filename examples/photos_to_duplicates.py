"""From photos to found duplicates, by the Python API of Grainmill.

Run it with `python examples/photos_to_duplicates.py`. In place of photos it draws 90 small pictures, and adds copies of
nine. Then it searches for a good embedding, embeds all pictures, and lists the most similar pairs: most are a picture
and its copy. Takes about two minutes on two cores. With photos of your own, put them into `photos/<class>/`, and change
the settings.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

import grainmill

SETTINGS = """
name: photos
data: {folder: photos}                    # photos/<class>/*.jpg
base:
  image_size: 48                          # for photos of usual size 224, and the trunk resnet18 or resnet50
  epochs: 5
  model: {trunk: narrow}
  batch: {size: 96, length_factor: 4.0}   # a small set: each epoch shows every picture four times
  augment: {policy: copy, crop: 0.5}      # views like copies: rotated, blurred, compressed
  evaluation: {transform: rect}
  optimizer: {rate: 0.5, schedule: cosine}
space:
  loss.weight: {uniform: [0.1, 0.5]}      # lambda; low, as copies matter more here than classes
  model.p: {uniform: [1.0, 5.0]}
objective: {class_map: max}
search: {trials: 2}
winner: {candidates: 1, seeds: 1}
"""


def write_pictures(folder: Path) -> None:
    """Draw `folder`/<class>/*.jpg, and a copy of every tenth picture: cropped, brighter, compressed."""
    random = np.random.default_rng(0)

    def colour() -> tuple[int, ...]:
        return tuple(random.integers(0, 256, 3).tolist())

    for name, sides in (("triangles", 3), ("squares", 4), ("hexagons", 6)):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            picture = Image.new("RGB", (96, 96), colour())
            draw = ImageDraw.Draw(picture)
            for x, y, radius in random.integers(0, (96, 96, 32), (12, 3)).tolist():
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour())
            draw.regular_polygon((48, 48, 30), sides, int(random.integers(360)), colour())
            picture.save(folder / name / f"{number:02d}.jpg", quality=95)
            if number % 10 == 0:
                copy = ImageEnhance.Brightness(picture.crop((4, 4, 92, 92))).enhance(1.15)
                copy.save(folder / name / f"{number:02d}-copy.jpg", quality=60)


if __name__ == "__main__":  # needed here: Ray and the loaders start further Python processes
    if not Path("photos").exists():
        write_pictures(Path("photos"))
        Path("photos.yaml").write_text(SETTINGS)

    # The search; called again, it carries on where it was interrupted.
    outcome = grainmill.tune(grainmill.load("photos.yaml"))
    print(f"{outcome.version.uri}: report in {outcome.report}")

    # All pictures in one index, a folder of Parquet files.
    grainmill.embed(outcome.version, "photos", "photos.index", tracking_uri=outcome.tracking_uri)

    # The most similar pairs; without `threshold`, those above an estimated precision of 90 %.
    found = grainmill.duplicates("photos.index", threshold=0.5)
    for (one, other), score in zip(found.pairs[:10], found.scores, strict=False):
        print(f"{score:.3f}  {one}  {other}")
