"""Fit a recipe's model on the cluster.

ray job submit --working-dir . -- python -m jobs.train jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
