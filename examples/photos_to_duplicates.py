"""From photos to found duplicates, by the Python API of Grainmill.

Run it with `python examples/photos_to_duplicates.py`. It cuts 88 small photos out of two that come with scikit-learn,
and adds copies of ten. Then it searches for a good embedding, embeds all photos, and lists the most similar pairs.
Takes about two minutes on two cores. With photos of your own, put them into `photos/<class>/`, and change the settings.
"""

from pathlib import Path

from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

import grainmill

SETTINGS = """
name: photos
data: {folder: photos}                    # photos/<class>/*.jpg
base:
  image_size: 48                          # for photos of usual size 224, and the trunk resnet18 or resnet50
  epochs: 5
  model: {trunk: narrow}
  batch: {size: 96, length_factor: 8.0}   # a small set: each epoch shows every photo 8 times
  augment: {policy: copy, crop: 0.5}      # views like copies: rotated, blurred, compressed
  evaluation: {transform: rect}
  optimizer: {rate: 0.5, schedule: cosine}
space:
  loss.weight: {uniform: [0.05, 0.3]}     # lambda; low, as copies matter more than classes
  model.p: {uniform: [1.0, 5.0]}
objective: {class_map: max}
search: {trials: 2, first: [{loss.weight: 0.1}]}
winner: {candidates: 1, seeds: 1}
"""


def write_photos(folder: Path) -> None:
    """Write `folder`/<class>/*.jpg, and a copy of every tenth photo: cropped, brighter, compressed."""
    for photo, name in zip(load_sample_images().images, ("temple", "flower"), strict=True):
        (folder / name).mkdir(parents=True)
        corners = [(top, left) for top in range(0, 361, 60) for left in range(0, 577, 64)]
        tiles = [photo[top : top + 64, left : left + 64] for top, left in corners]
        for number, tile in enumerate(tile for tile in tiles if tile.std() > 30):  # without the empty sky
            cut = Image.fromarray(tile)
            cut.save(folder / name / f"{number:02d}.jpg", quality=95)
            if number % 10 == 0:
                copy = ImageEnhance.Brightness(cut.crop((3, 3, 61, 61))).enhance(1.15)
                copy.save(folder / name / f"{number:02d}-copy.jpg", quality=60)


if __name__ == "__main__":  # needed here: Ray and the loaders start further Python processes
    if not Path("photos").exists():
        write_photos(Path("photos"))
        Path("photos.yaml").write_text(SETTINGS)

    # The search; called again, it carries on where it was interrupted.
    outcome = grainmill.tune(grainmill.load("photos.yaml"))
    print(f"{outcome.version.uri}: {outcome.winner}, report in {outcome.report}")

    # All photos in one index, a folder of Parquet files.
    grainmill.embed(outcome.version, "photos", "photos.index", tracking_uri=outcome.tracking_uri)

    # The most similar pairs; without `threshold`, those above an estimated precision of 90 %.
    found = grainmill.duplicates("photos.index", threshold=0.5)
    for (one, other), score in zip(found.pairs[:10], found.scores, strict=False):
        print(f"{score:.3f}  {one}  {other}")
