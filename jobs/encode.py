"""Encode a recipe's sample set with its autoencoder.

ray job submit --working-dir . -- python -m jobs.encode jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["encode", *sys.argv[1:]])
