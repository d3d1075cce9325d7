#!/bin/bash
# One verb of a recipe on some nodes of a Slurm cluster:
#   sbatch --nodes 4 cluster/slurm.sh train jobs/recipes/lidc_attributes_ldm_4.yaml --set work_dir=/scratch/lidc
# The same command again goes on where it stopped. Activate the environment before, or here.
#SBATCH --job-name=raysynth
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=raysynth-%j.log
set -euo pipefail

verb=${1:?"which verb: ingest, shard, train, encode, synthesize, evaluate, audit or downstream"}
recipe=${2:?"which recipe: a YAML file"}
shift 2

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines 1)
# Everybody on the network reaches Ray's ports: nobody enters without this job's token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_ADDRESS="$head:6379" RAY_USAGE_STATS_ENABLED=0

srun --kill-on-bad-exit=1 ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
    -- python -m "jobs.$verb" "$recipe" "$@"
