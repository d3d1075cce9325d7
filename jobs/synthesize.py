"""Draw a recipe's synthetic samples on the cluster.

ray job submit --working-dir . -- python -m jobs.synthesize jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
