"""Read a recipe's scans into its store.

ray job submit --working-dir . -- python -m jobs.ingest jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["ingest", *sys.argv[1:]])
