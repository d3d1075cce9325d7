"""Judge a recipe's synthetic samples and write the report.

ray job submit --working-dir . -- python -m jobs.evaluate jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
