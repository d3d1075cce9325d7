"""Look for copies of training samples in a synthetic run; exits 3 if it must not leave.

ray job submit --working-dir . -- python -m jobs.audit jobs/recipes/lidc_attributes_ldm_4.yaml
"""

import sys

from raysynth.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
