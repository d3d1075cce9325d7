"""Fit a recipe's model on the cluster.

ray job submit --working-dir . -- python -m jobs.train jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
