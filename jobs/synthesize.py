"""Draw a recipe's synthetic samples on the cluster.

ray job submit --working-dir . -- python -m jobs.synthesize jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["synthesize", *sys.argv[1:]])
