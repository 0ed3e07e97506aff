"""Images a second into an index: `grainmill embed` on one worker against a plain loop of torch.

    python -m tests.benchmarks.corpus [--images 1500] [--rounds 3] [--trunk resnet18]

500 x 375 JPEGs of some 75 kB at 224 pixels. Both have the same network; the plain loop reads by a DataLoader with as many
processes as there are cores, Pillow and the transforms of torchvision's examples, in batches of 64, and keeps its
embeddings in memory. Of both, the time from the first batch to the last counts, without the start of processes.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from grainmill import catalog, corpus, registry, trials
from grainmill.embedder import Embedder
from grainmill.tracking import Tracker, local_uri
from multigrain import checkpoint, predict
from multigrain.fit import fit
from multigrain.manifest import read_manifest
from multigrain.spec import MultiGrainSpec
from tests.benchmarks.embedding import Plain
from tests.benchmarks.loader import photo
from tests.benchmarks.table import Goal, compare, machine, report

BATCH = 64
OURS, PLAIN = "grainmill embed, one worker", "plain torch loop"
