"""Cut a recipe's sample set from the stored volumes.

ray job submit --working-dir . -- python -m jobs.shard jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
