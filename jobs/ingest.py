"""Read a recipe's scans into its store.

ray job submit --working-dir . -- python -m jobs.ingest jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
