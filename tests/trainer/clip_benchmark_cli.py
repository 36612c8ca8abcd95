"""CLIP_benchmark's own command line, where numpy 2.4 or newer is installed.

Its version 1.6.2 turns an array of one element into a number by `float`, which numpy no longer does.
"""

import sys

import numpy as np
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification

zeroshot_classification.float = lambda value: float(np.asarray(value).item())
sys.exit(cli.main())
