"""Encode a recipe's sample set with its autoencoder.

ray job submit --working-dir . -- python -m jobs.encode jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
