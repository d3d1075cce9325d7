"""Cut a recipe's sample set from the stored volumes.

ray job submit --working-dir . -- python -m jobs.shard jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["shard", *sys.argv[1:]])
